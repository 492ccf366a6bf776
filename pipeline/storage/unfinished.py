"""An unfinished beton next to the file to write, from which a later run with the same facts resumes."""

import contextlib
import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.sources.listing import Listing
from pipeline.storage.decode import DECODER
from pipeline.storage.journal import Journal
from pipeline.storage.writer import BLOCK_IMAGES, BetonWriter
from pipeline.system.packages import version

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def unfinished(out: Path, images: Listing, facts: dict[str, Any], resume: bool) -> Iterator[BetonWriter]:
    """Yield a writer of the unfinished beton next to `out`, after the images of an earlier run with the same facts.

    File and journal are deleted after the block, unless it fails with a block of records in the journal.
    """
    path = writing_path(out)
    journal_path = path.with_name(f"{path.name}.journal")
    journal, is_kept = Journal.open(journal_path), True
    try:
        writer = _resumed(path, images, journal, facts) if resume else None
        if writer is None:
            is_kept = False
            path.unlink(missing_ok=True)
            journal.begin({**facts, "started": time.time()})
            writer = BetonWriter(path, len(images), journal)
        try:
            yield writer
            is_kept = False
        except BaseException:
            is_kept = writer.synced_images >= BLOCK_IMAGES
            if is_kept:
                logger.warning(
                    "%d of %d images are in %s: give the same command again to resume, or delete it and its journal",
                    *(writer.synced_images, len(images), path),
                )
            raise
        finally:
            writer.abort()
    finally:
        if not is_kept:
            path.unlink(missing_ok=True)
            journal_path.unlink(missing_ok=True)
        journal.close()


def writing_path(path: Path) -> Path:
    """Return the name of a file while it is written. The same for each run, which holds the journal's lock."""
    return path.with_name(f".writing-{path.name}")


def _resumed(path: Path, images: Listing, journal: Journal, facts: dict[str, Any]) -> BetonWriter | None:
    """Return the writer of an earlier run with the same facts, or None for a new one."""
    earlier = journal.facts()
    if not earlier:
        return None
    differing = [name for name in facts if earlier.get(name) != facts[name]]
    try:
        if differing:
            raise ValueError(f"its {' and '.join(differing)} differ")
        writer = BetonWriter(path, len(images), journal, resume=True)
        if writer.images > len(images) or _have_changed(images, writer.images, earlier.get("started")):
            writer.abort()
            raise ValueError("images have changed since")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("starting again instead of resuming an unfinished run: %s", reason)
        return None
    logger.info("resuming after %d of %d images of an unfinished run", writer.images, len(images))
    return writer


def _have_changed(images: Listing, count: int, started: Any) -> bool:
    """Return whether one of the first images is a file that changed after the time `started`, seconds."""
    paths = (images[index].path for index in range(count)) if images.has_files else ()
    return not isinstance(started, float) or any(_change_time(path) >= started for path in paths)


def _change_time(path: str) -> float:
    try:
        return os.stat(path).st_ctime
    except FileNotFoundError:  # a link to nothing, which was skipped
        return os.lstat(path).st_ctime


def code_digest() -> str:
    """Return a hash of the code that determines the file, and of the versions of packages."""
    files = sorted(path for path in Path(__file__).parents[1].rglob("*") if path.suffix in (".py", ".c"))
    digest = hashlib.sha256(repr((versions(), DECODER)).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a beton."""
    packages = {package: version(package) for package in ("millrace", "ffcv", "numpy", "pillow")}
    return {"python": platform.python_version(), **{name: number for name, number in packages.items() if number}}
