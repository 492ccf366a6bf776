"""Images to a beton file with its manifest.

    python -m pipeline.prepare SOURCE OUT.beton [--max-side 500] [--quality 90] [--encode-all]
                                [--mode jpg|raw|proportion] [--labels LIST [--classes-of train.beton]]

SOURCE is a folder (with class folders, or flat and unlabeled), a tar or zip of one, ILSVRC2012's tar of tars, or
synthetic:N. Classes are its folders, or those of a list of names, as for ImageNet's flat tar of validation images. A
JPEG that is small enough and upright is stored byte for byte. The output is the same, byte for byte, whatever the
number of workers; it is written beside OUT and renamed, so that OUT is whole or not there.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
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

from pipeline.beton import Beton, Manifest, manifest_path
from pipeline.sampling.order import evenly
from pipeline.sources.archives import Item, Source, open_source
from pipeline.sources.labels import relabel
from pipeline.storage.encode import Record, Settings, Unreadable, encode
from pipeline.storage.writer import BetonWriter
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command
from pipeline.system.packages import version
from pipeline.system.progress import progress
from pipeline.system.text import printable

_AHEAD = 32  # images a worker may be ahead of the writer
_large: Any = contextlib.nullcontext()  # in workers a lock: over all of them, one large image is decoded at a time


def _work(item: Item, index: int, settings: Settings) -> Record | str:
    """What a worker process does for one image: its record, or the reason it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on odd EXIF, palettes and large images, which are no errors
            return encode(item.read(), index, settings, _large)
    except Unreadable as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _start_worker(large: Any) -> None:
    global _large
    _large = large
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow_parent, daemon=True).start()  # or, killed, takes them with it


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _records(items: list[Item], settings: Settings, workers: int) -> Generator[Record | str, None, None]:
    """Yield the items' records in order, from `workers` processes."""
    if workers == 1:
        yield from (_work(item, index, settings) for index, item in enumerate(items))
        return
    # Forked workers are ready at once, where no thread of ours could hold a lock; spawned ones take seconds to import.
    context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")
    _work(items[0], 0, settings)  # compiled here, once, for all that are forked
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(context.Lock(),))
    try:
        under_way: deque[Future] = deque()
        for index, item in enumerate(items):
            under_way.append(pool.submit(_work, item, index, settings))
            if len(under_way) >= workers * _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise InputError("a worker process was killed, most likely for lack of memory: use fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prepare(
    source: str,
    out: Path | str,
    settings: Settings | None = None,
    *,
    workers: int = 0,
    limit: int = 0,
    subset: str | None = None,
    labels: Path | None = None,
    classes: Sequence[str] = (),
    skip_bad: int = 0,
    quiet: bool = False,
) -> Manifest:
    """Write the images of `source` to the beton `out` and its manifest beside it; return the manifest.

    labels, classes: a list of the images' classes, and these by label; see `pipeline.sources.labels.relabel`.

    Raises InputError, leaving `out` as it was, where the source or an image cannot be read; up to `skip_bad`
    unreadable images are left out instead.
    """
    settings, out = settings or Settings(), Path(out)
    if not out.parent.is_dir():
        raise InputError(f"{out}: its folder does not exist: make it with mkdir -p {out.parent}")
    if out.is_dir():
        raise InputError(f"{out}: is a folder: give the name of the file to write, such as {out / 'train.beton'}")
    images = open_source(source, subset)
    if labels is not None:
        images = relabel(images, labels, classes)
    if limit:  # all classes keep their share
        images = Source([images.items[i] for i in evenly(len(images.items), limit)], images.classes)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        temporary.unlink(missing_ok=True)  # of a process of that number that was killed
        manifest = _write(source, images, temporary, settings, workers or available_cores(), skip_bad, quiet)
        manifest.write(temporary.with_suffix(".json"))
        manifest_path(out).unlink(missing_ok=True)  # never an old manifest beside a new file
        os.replace(temporary, out)
        os.replace(temporary.with_suffix(".json"), manifest_path(out))
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written: {error.strerror or error}: free space or choose another place"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            temporary.with_suffix(".json").unlink(missing_ok=True)
    return manifest


def _write(
    source: str, images: Source, path: Path, settings: Settings, workers: int, skip_bad: int, quiet: bool
) -> Manifest:
    writer = BetonWriter(path, len(images.items))
    crcs: list[int] = []
    names: list[str] = []
    skipped: list[list[str]] = []
    try:
        with contextlib.closing(_records(images.items, settings, min(workers, len(images.items)))) as records:
            for item, record in zip(progress(images.items, "images", quiet=quiet), records, strict=True):
                if isinstance(record, Record):
                    try:
                        writer.append(record, item.label)
                        crcs.append(record.crc32)
                        names.append(item.name)
                        continue
                    except Unreadable as error:
                        record = str(error)
                skipped.append([item.name, record])
                if len(skipped) > skip_bad:
                    raise _unreadable(source, skipped)
        if not names:
            raise InputError(f"{source}: none of its {len(skipped)} images can be read: check that they are images")
        header_crc32 = writer.close()
    except BaseException:
        writer.abort()
        raise
    return Manifest(
        count=len(names),
        classes=images.classes,
        header_crc32=header_crc32,
        file_size=path.stat().st_size,
        settings={"source": source, **asdict(settings)},
        versions=_versions(),
        crc32=crcs,
        names=names,
        skipped=skipped,
    )


def _versions() -> dict[str, str]:
    found = {package: version(package) for package in ("millrace", "ffcv", "numpy", "pillow")}
    return {"python": platform.python_version(), **{name: known for name, known in found.items() if known}}


def _unreadable(source: str, skipped: list[list[str]]) -> InputError:
    name, reason = skipped[-1]
    allowed = f" ({len(skipped) - 1} before it were left out)" if len(skipped) > 1 else ""
    return InputError(
        f"{source}: image {name} cannot be stored: {reason}{allowed}: mend or remove it, or leave such images out with "
        f"--skip-bad {max(10, 2 * len(skipped))}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.prepare", description="Write images to a beton file with its manifest."
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, .tar (ILSVRC2012's tar of tars too), .zip, or synthetic:N")
    add("out", metavar="OUT.beton", type=Path, help="file to write")
    add("--max-side", type=int, default=500, help="longest side, pixels; 0: as they are (default %(default)s)")
    add("--quality", type=int, default=90, help="JPEG quality of those encoded (default %(default)s)")
    add(
        "--encode-all",
        action="store_true",
        help="encode anew what could be stored as it is, too: of ImageNet smaller and faster to decode, a little lossy",
    )
    add(
        "--mode",
        choices=("jpg", "raw", "proportion"),
        default="jpg",
        help="how images are stored (default %(default)s)",
    )
    add(
        "--jpeg-share",
        type=float,
        default=0.5,
        help="share of JPEGs in --mode proportion (default %(default)s)",
    )
    add("--workers", type=int, default=0, help="processes (default: all cores)")
    add("--limit", type=int, default=0, help="take only this many images, spread evenly over the source")
    add("--subset", help="take only what stands in this folder of SOURCE, such as train")
    add("--labels", type=Path, metavar="LIST", help="file of NAME CLASS lines, in place of class folders")
    add("--classes-of", type=Path, metavar="BETON", help="whose class names and numbers those of --labels are")
    add(
        "--ignore-exif",
        action="store_true",
        help="do not turn images upright (torchvision's loader does not)",
    )
    add(
        "--skip-bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N unreadable images and list them",
    )
    return parser.parse_args()


def _classes(path: Path) -> list[str]:
    """Return the class names of a beton. Raises InputError where it has none."""
    classes = Beton(path).classes
    if not classes:
        raise InputError(f"--classes-of {path}: it has no class names: give one that was prepared from class folders")
    return classes


@command
def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaving nothing half written
    args = _arguments()
    if min(args.workers, args.limit, args.skip_bad) < 0:
        raise InputError("--workers, --limit and --skip-bad must not be negative: give 0 or more")
    settings = Settings(args.max_side, args.quality, args.mode, args.jpeg_share, args.ignore_exif, args.encode_all)
    if args.classes_of and not args.labels:
        raise InputError(
            f"--classes-of {args.classes_of}: is of --labels, which is not given: leave it out or give both"
        )
    classes = _classes(args.classes_of) if args.classes_of else []
    options = {"workers": args.workers, "limit": args.limit, "subset": args.subset, "skip_bad": args.skip_bad}
    options |= {"labels": args.labels, "classes": classes}
    manifest = prepare(args.source, args.out, settings, **options)
    for name, reason in manifest.skipped:
        print(printable(f"left out: {name}: {reason}"), file=sys.stderr)
    unlabeled = manifest.classes and not args.labels
    alone = sum("/" not in name for name in manifest.names) if unlabeled else 0
    if alone:
        print(f"warning: {alone} images stand in no class folder and have no label", file=sys.stderr)
    kind = f"{len(manifest.classes)} classes" if manifest.classes else "unlabeled"
    print(f"{args.out}: {manifest.count} images, {kind}, {manifest.file_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
