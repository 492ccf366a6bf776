"""Copy a beton and its manifest to a local disk, once:  python -m pipeline.stage /shared/train.beton /local/disk

For data on a shared file system that many machines read again and again. An existing copy of the same size, tables and
CRCs is reused; any other is replaced once the new copy is complete.
"""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.beton import Beton
from pipeline.beton_set import part_paths
from pipeline.manifest import columns_path, manifest_path, side_files
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, command
from pipeline.system.files import atomic_path
from pipeline.system.progress import tqdm
from pipeline.system.text import binary

_BLOCK_BYTES = 1 << 24


def stage(source: Path, folder: Path) -> Path:
    """Copy the beton `source`, its manifest and columns into `folder`; return the copy's path.

    A crash leaves no partial copy under its name. Of several processes with one folder, the first copies and the others
    wait. Raises InputError if the source is not a beton or cannot be read, and for lack of space.
    """
    original, target = Beton(source), folder / source.name
    if target.exists() and target.resolve() == source.resolve():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _same(original, target):
                _replace(source, target)
    except OSError as error:
        of_source = getattr(error, "filename", None) in [str(path) for path in (source, *side_files(source))]
        where, remedy = (source, "make it readable") if of_source else (folder, "choose another folder")
        raise InputError(f"{where}: {error.strerror or error}: {remedy}") from None
    if not _same(original, target):
        raise InputError(f"{target}: differs from {source}, which changed during the copy: stage it again")
    return target


def _same(original: Beton, path: Path) -> bool:
    """Return whether the beton at `path` has the same size, header, tables and CRCs of records."""
    try:
        return path.stat().st_size == original.path.stat().st_size and Beton(path).fingerprint == original.fingerprint
    except (OSError, InputError):
        return False


def _replace(source: Path, target: Path) -> None:
    """Replace `target`, its manifest and columns by copies of the source's, once all copies are complete."""
    manifest = manifest_path(target)
    names = {".json": manifest, ".columns": columns_path(manifest)}
    # The manifest first, and therefore renamed last: without it no columns are read.
    pairs = [(path, names[path.suffix]) for path in reversed(side_files(source))] + [(source, target)]
    with contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(atomic_path(copy, unique=False)) for _, copy in pairs]
        needed, free = sum(path.stat().st_size for path, _ in pairs), shutil.disk_usage(target.parent).free
        if free < needed:
            raise InputError(f"{target.parent}: {binary(needed)} needed, {binary(free)} free: choose another folder")
        for (path, _), temporary in zip(pairs, temporaries, strict=True):
            _copy(path, temporary)
        manifest.unlink(missing_ok=True)  # an old manifest never accompanies a new beton


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let other processes that stage into `folder` wait during the block."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as write:  # x: never through a planted link
        interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds between two lines of progress
        size = source.stat().st_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=source.name, mininterval=interval) as bar:
            while block := _read(read, source):
                write.write(block)
                bar.update(len(block))
        write.flush()
        os.fsync(write.fileno())


def _read(file: IO[bytes], source: Path) -> bytes:
    """Return the next block. Raises OSError with the source's name, so that it is not taken for one of the copy."""
    try:
        return file.read(_BLOCK_BYTES)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(source)) from None


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="python -m pipeline.stage", description="Copy a beton to a local disk.")
    parser.add_argument("source", metavar="BETON", help="beton on a shared file system, or a pattern of several")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder on a local disk")
    return parser


@command
def main() -> None:
    args = parser().parse_args()
    paths = [Path(path) for path in part_paths(args.source) or [args.source]]
    if len({path.name for path in paths}) < len(paths):
        raise InputError(f"{args.source}: parts of one name would replace each other: rename them")
    for path in paths:
        print(stage(path, args.folder))


if __name__ == "__main__":
    main()
