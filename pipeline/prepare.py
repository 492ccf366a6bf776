"""Write images to a beton file with its manifest.

    python -m pipeline.prepare SOURCE [SOURCE ...] OUT.beton [--max-side 500] [--quality 90] [--encode-all]
                                [--mode jpg|raw|proportion] [--labels LIST [--classes-of train.beton]]

SOURCE is a folder (with class folders, or flat and unlabeled), a tar or zip of one, ILSVRC2012's tar of tars, parquet
files of Hugging Face, a data set saved by `datasets.save_to_disk`, WebDataset shards, a CSV file of paths, or
synthetic:N. Several are
joined by the names of their classes. Classes are folders, class labels of tables and shards, or those of a list of
names, as for ImageNet's flat tar of validation images. An upright JPEG that is small enough is stored byte for byte.
The output does not depend on the number of workers. It is written to a temporary file and renamed: OUT is complete or
absent. After a crash the same command resumes where the last run ended.
"""

import argparse
import contextlib
import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.beton import Beton
from pipeline.columns import write_columns
from pipeline.manifest import Manifest, columns_path, manifest_path
from pipeline.sampling.order import evenly
from pipeline.sources.archives import Item
from pipeline.sources.images import list_images
from pipeline.sources.labels import relabel
from pipeline.sources.listing import Listing, listed
from pipeline.storage.colors import measure_colors
from pipeline.storage.encode import Record, Settings, Unreadable, encode
from pipeline.storage.unfinished import code_digest, unfinished, versions, writing_path
from pipeline.storage.writer import BetonWriter
from pipeline.system.cli import ArgumentParser
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command
from pipeline.system.files import atomic_path
from pipeline.system.progress import progress_bar

logger = logging.getLogger(__name__)
_CALL_IMAGES, _CALLS_AHEAD = 8, 4  # images in a call of a worker, calls that a worker is ahead of the writer
_large_lock: Any = contextlib.nullcontext()  # a lock in workers: together they decode one large image at a time


def _encode_item(item: Item, index: int, settings: Settings) -> Record | str:
    """Return the record of one image, or the reason why it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd EXIF, palettes and large images
            return encode(item.read(), index, settings, _large_lock)
    except Unreadable as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _encode_items(items: list[Item], first: int, settings: Settings) -> list[Record | str]:
    """Return the records of images number `first` and following, or their reasons; run by the workers."""
    return [_encode_item(item, index, settings) for index, item in enumerate(items, first)]


def _start_worker(large_lock: Any) -> None:
    global _large_lock
    _large_lock = large_lock
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _records(
    images: Sequence[Item], start: int, settings: Settings, workers: int
) -> Generator[tuple[Item, Record | str], None, None]:
    """Yield the images from number `start` on and their records in order, from `workers` processes."""
    if workers == 1:
        for index in range(start, len(images)):
            item = images[index]
            yield item, _encode_item(item, index, settings)
        return
    # Forked workers start at once; with other threads, which may hold locks, spawned ones, which import for seconds.
    context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")
    _encode_item(images[0], 0, settings)  # compiles once, for all forked workers
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(context.Lock(),))
    try:
        under_way: deque[tuple[list[Item], Future]] = deque()
        for first in range(start, len(images), _CALL_IMAGES):
            items = list(images[first : first + _CALL_IMAGES])  # places in files, a few hundred bytes each
            under_way.append((items, pool.submit(_encode_items, items, first, settings)))
            if len(under_way) >= workers * _CALLS_AHEAD:
                items, records = under_way.popleft()
                yield from zip(items, records.result(), strict=True)
        for items, records in under_way:
            yield from zip(items, records.result(), strict=True)
    except BrokenProcessPool:
        raise InputError("a worker process was killed, most likely for lack of memory: use fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prepare(
    source: str | Sequence[str],
    out: Path | str,
    settings: Settings | None = None,
    *,
    workers: int = 0,
    limit: int = 0,
    subset: str | None = None,
    labels: Path | None = None,
    classes: Sequence[str] = (),
    skip_bad: int = 0,
    resume: bool = True,
    quiet: bool = False,
    image_column: str = "",
    label_column: str = "",
) -> Manifest:
    """Write the images of a source, or of several, to the beton `out`, its manifest and columns; return the manifest.

    workers: processes, 0 for one on each core. limit: images at most, spread evenly over the source, 0 for all.
    subset, image_column, label_column: as for `list_images`. labels, classes: a list of the images' classes, and the
    classes by label, as for `relabel`. skip_bad: unreadable images to skip at most. resume: continue after the images
    of a run that was killed, where source, settings and code are the same.

    Raises InputError, leaving `out` unchanged, where the source or an image cannot be read or `out` be written.
    """
    settings, out = settings or Settings(), Path(out)
    if not out.parent.is_dir():
        raise InputError(f"{out}: its folder does not exist: make it with mkdir -p {out.parent}")
    if out.is_dir():
        raise InputError(f"{out}: is a folder: give the name of the file to write, such as {out / 'train.beton'}")
    sources = [source] if isinstance(source, str) else list(source)
    try:
        images = list_images(sources, subset, image_column=image_column, label_column=label_column, folder=out.parent)
        if labels is not None:
            images = relabel(images, labels, classes)
        listing = images.items if isinstance(images.items, Listing) else listed(images.items, out.parent)
        unlabeled = listing.count_unlabeled()
        if images.classes and unlabeled:
            logger.warning("%d images have no label", unlabeled)
        if limit:  # the items are sorted by class: each class retains its share
            listing = listing.take(evenly(len(listing), limit))
        described = {"source": " ".join(sources), **asdict(settings)}
        source_digest = hashlib.sha256(repr((listing.digest(), images.classes)).encode("utf-8", "backslashreplace"))
        facts = {"source": source_digest.hexdigest(), "settings": described, "code": code_digest()}
        with unfinished(out, listing, facts, resume) as writer:
            _write(" ".join(sources), listing, writer, settings, workers or available_cores(), skip_bad, quiet)
            return _finish(out, images.classes, listing, writer, described)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written: {error.strerror or error}: free space or choose another place"
        ) from None


def _write(
    source: str,
    images: Listing,
    writer: BetonWriter,
    settings: Settings,
    workers: int,
    skip_bad: int,
    quiet: bool,
) -> None:
    """Write the records of all images that are not in the file yet."""
    if len(writer.skipped) > skip_bad:  # of an earlier run that was given more
        raise _unreadable(source, writer.skipped[: skip_bad + 1])
    remaining = _records(images, writer.images, settings, min(workers, len(images)))
    with contextlib.closing(remaining), progress_bar(len(images), "images", quiet=quiet, done=writer.images) as bar:
        for item, record in remaining:
            try:
                if isinstance(record, str):
                    raise Unreadable(record)
                writer.append(record, item.label)
            except Unreadable as error:
                if len(writer.skipped) == skip_bad:
                    raise _unreadable(source, [*writer.skipped, [item.name, str(error)]]) from None
                writer.skip(item.name, str(error))
            bar.update()
    if not writer.count:
        raise InputError(f"{source}: none of its {len(writer.skipped)} images can be read: check that they are images")


def _finish(out: Path, classes: list[str], images: Listing, writer: BetonWriter, settings: dict[str, Any]) -> Manifest:
    """Complete the file, write its manifest and columns, and rename all three; return the manifest."""
    header_crc32 = writer.close()
    path, manifest_to = writing_path(out), manifest_path(out)
    manifest = Manifest(
        count=writer.count,
        classes=classes,
        header_crc32=header_crc32,
        file_size=path.stat().st_size,
        settings=settings,
        versions=versions(),
        skipped=writer.skipped,
    )
    with (
        atomic_path(manifest_to, unique=False) as manifest_file,
        atomic_path(columns_path(manifest_to), unique=False) as columns_file,
    ):
        # Here, where no manifest of an earlier run is next to the file.
        manifest.mean, manifest.std = measure_colors(Beton(path))
        numbers = (entries["image"].tolist() for entries in writer.entries())
        name_bytes = sum(len(images.name_bytes(image)) for part in numbers for image in part)
        parts = (
            ([images.name_bytes(image) for image in entries["image"].tolist()], entries["crc32"])
            for entries in writer.entries()
        )
        manifest.columns = write_columns(columns_file, writer.count, name_bytes, parts)
        manifest.write(manifest_file)
        manifest_to.unlink(missing_ok=True)  # an old manifest never accompanies a new beton
        os.replace(path, out)
    return manifest


def _unreadable(source: str, skipped: list[list[str]]) -> InputError:
    name, reason = skipped[-1]
    before = f" ({len(skipped) - 1} before it were skipped)" if len(skipped) > 1 else ""
    return InputError(
        f"{source}: image {name} cannot be stored: {reason}{before}: repair or delete it, or leave out at most N such "
        "images with --skip-bad N"
    )


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(
        prog="python -m pipeline.prepare", description="Write images to a beton file with its manifest."
    )
    add = parser.add_argument
    add(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="folder, .tar (ILSVRC2012's tar of tars too), .zip, .parquet, WebDataset shards, a folder of datasets."
        "save_to_disk, .csv or .tsv of paths, a pattern of such files in quotes, or synthetic:N",
    )
    add("out", metavar="OUT.beton", type=Path, help="file to write")
    add("--max-side", type=int, default=500, help="longest side, pixels; 0: no limit (default %(default)s)")
    add("--quality", type=int, default=90, help="JPEG quality of encoded images (default %(default)s)")
    add(
        "--encode-all",
        action="store_true",
        help="encode all images again: for ImageNet smaller and faster to decode, with a small loss",
    )
    modes = ("jpg", "raw", "proportion")
    add("--mode", choices=modes, default="jpg", help="how images are stored (default %(default)s)")
    add("--jpeg-share", type=float, default=0.5, help="share of JPEGs in --mode proportion (default %(default)s)")
    add("--workers", type=int, default=0, help="processes (default: one for each core)")
    add("--limit", type=int, default=0, help="images to take at most, spread evenly over the source (default: all)")
    add("--subset", help="take only the images in this folder of SOURCE, such as train")
    add(
        "--image-column",
        default="",
        metavar="NAME",
        help="column of the images in tables, or of the paths in a .csv (default: the only one, or the first)",
    )
    add(
        "--label-column",
        default="",
        metavar="NAME",
        help="column of the labels in tables and .csv files, or key in shards' JSON",
    )
    add("--labels", type=Path, metavar="LIST", help="file of NAME CLASS lines, instead of class folders")
    add("--classes-of", type=Path, metavar="BETON", help="number the classes of --labels as in this beton")
    add("--ignore-exif", action="store_true", help="do not turn images upright, like torchvision's loader")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on after the images of an unfinished run of the same source, settings and code (default %(default)s)",
    )
    add("--skip-bad", type=int, default=0, metavar="N", help="skip up to N unreadable images, and list them")
    return parser


@command
def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # deletes the temporary file
    args = parser().parse_args()
    if min(args.workers, args.limit, args.skip_bad) < 0:
        raise InputError("--workers, --limit and --skip-bad must not be negative: give 0 or more")
    settings = Settings(args.max_side, args.quality, args.mode, args.jpeg_share, args.ignore_exif, args.encode_all)
    if args.classes_of and not args.labels:
        raise InputError(f"--classes-of {args.classes_of}: it needs --labels: give both or neither")
    classes = Beton(args.classes_of).classes if args.classes_of else []
    if args.classes_of and not classes:
        raise InputError(
            f"--classes-of {args.classes_of}: it has no class names: give one that was prepared from class folders"
        )
    manifest = prepare(
        args.sources,
        args.out,
        settings,
        workers=args.workers,
        limit=args.limit,
        subset=args.subset,
        labels=args.labels,
        classes=classes,
        skip_bad=args.skip_bad,
        resume=args.resume,
        image_column=args.image_column,
        label_column=args.label_column,
    )
    for name, reason in manifest.skipped:
        logger.info("skipped: %s: %s", name, reason)
    kind = f"{len(manifest.classes)} classes" if manifest.classes else "unlabeled"
    print(f"{args.out}: {manifest.count} images, {kind}, {manifest.file_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
