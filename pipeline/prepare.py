"""Images to a beton file with its manifest.

    python -m pipeline.prepare SOURCE OUT.beton [--max-side 500] [--quality 90] [--mode jpg|raw|proportion]

SOURCE is a folder (with class folders, or flat and unlabelled), a tar or zip of one, ILSVRC2012's tar of tars, or
synthetic:N. A JPEG that is small enough and upright is stored byte for byte. The output is the same, byte for byte,
whatever the number of workers; it is written beside OUT and renamed, so that OUT is whole or not there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import platform
import signal
import sys
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.backends.ffcv import available_cores, jpeg_side_lengths
from pipeline.beton import Manifest, manifest_path
from pipeline.errors import InputError, command
from pipeline.hashing import mix
from pipeline.libffcv import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    JPEG,
    RAW,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    IntField,
    RGBImageField,
    decode_jpeg,
    get_metadata_type,
)
from pipeline.progress import progress
from pipeline.sources import Item, Source, open_source

PAGE = 1 << 23  # FFCV's default: no record crosses a page of its own size or larger
_LARGEST_PAGE = 1 << 31
_LONGEST_SIDE = 65500  # the JPEG encoder's; the format itself holds 65535
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_AHEAD = 32  # images a worker may be ahead of the writer


@dataclass(frozen=True)
class Settings:
    """How images are stored."""

    max_side: int = 500
    """Longest side, pixels; larger images are shrunk to it. 0: never."""
    quality: int = 90
    """JPEG quality of those that are encoded."""
    mode: str = "jpg"
    """jpg; raw: pixels; proportion: a share of them as JPEG and the others raw."""
    jpeg_share: float = 0.5
    """That share."""
    ignore_exif: bool = False
    """Leave images as stored, whatever their EXIF orientation says (torchvision's loader does)."""

    def __post_init__(self) -> None:
        if self.max_side < 0 or self.max_side > _LONGEST_SIDE:
            raise InputError(f"--max-side {self.max_side}: give 0 (no limit) to {_LONGEST_SIDE} pixels")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality}: give 1 to 100")
        if not 0 <= self.jpeg_share <= 1:
            raise InputError(f"--jpeg-share {self.jpeg_share}: give 0 to 1")


@dataclass(frozen=True)
class Record:
    """One image as it will be stored."""

    data: bytes
    mode: int
    height: int
    width: int
    crc32: int


class Unreadable(Exception):
    """An image that cannot be stored; the message is the reason."""


def encode(data: bytes, index: int, settings: Settings) -> Record:
    """Return the record for image file `data`, sample `index`. Raises Unreadable."""
    image = _open(data)
    as_jpeg = settings.mode == "jpg" or (
        settings.mode == "proportion" and float(mix(np.uint64(index))) < settings.jpeg_share * 2.0**64
    )
    if as_jpeg and _storable(data, image, settings):
        return _record(data, JPEG, image.height, image.width)
    image = _to_rgb(image, settings)
    image = _shrink(image, settings.max_side)
    if not as_jpeg:
        return _record(image.tobytes(), RAW, image.height, image.width)
    encoded = io.BytesIO()
    image.save(encoded, "jpeg", quality=settings.quality)
    return _record(encoded.getvalue(), JPEG, image.height, image.width)


def _record(data: bytes, mode: int, height: int, width: int) -> Record:
    return Record(data, mode, height, width, zlib.crc32(data))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise Unreadable("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:  # of any kind: Pillow's decoders meet bytes they were not written for
        raise Unreadable(_reason(error)) from None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _storable(data: bytes, image: Image.Image, settings: Settings) -> bool:
    """Whether a file can stand in the beton as it is: an upright RGB or grey JPEG that the loader's decoder reads."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    if settings.max_side and max(image.size) > settings.max_side:
        return False
    if not settings.ignore_exif and _turn(image) is not None:
        return False
    source, (width, height) = np.frombuffer(data, np.uint8), image.size
    if jpeg_side_lengths(source) != (height, width):
        return False
    pixels = np.empty(3 * height * width, np.uint8)
    h, w = np.uint32(height), np.uint32(width)
    return bool(decode_jpeg(source, pixels, h, w, h, w, 0, 0, 1, 1, False, False) == 0)


def _to_rgb(image: Image.Image, settings: Settings) -> Image.Image:
    """Return the image upright, in 8-bit RGB; alpha is dropped as by torchvision's loader."""
    try:
        image.load()
        turn = None if settings.ignore_exif else _turn(image)
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I") or image.mode == "F":
            image = _sixteen_to_eight(image)
        return image.convert("RGB")
    except Exception as error:  # of any kind, as in `_open`
        raise Unreadable(_reason(error)) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns the image upright, as its EXIF orientation says; None where it is, or the EXIF is damaged."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode != "F" or values.max() > 255:
        values = values / 257  # 65535 is white
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


def _shrink(image: Image.Image, max_side: int) -> Image.Image:
    longest = max(image.size)
    if longest > _LONGEST_SIDE and not max_side:
        raise Unreadable(f"{longest} pixels a side, the format holds {_LONGEST_SIDE}: use --max-side")
    if not max_side or longest <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


class BetonWriter:
    """Writes records, in order, to a beton file that FFCV's own loader reads as well.

    `capacity` is the most samples there may be; their metadata stands before the records. `close` writes metadata,
    allocation table and header and returns the CRC32 over the three.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        fields = {"image": RGBImageField(), "label": IntField()}
        self._row = get_metadata_type(list(fields.values()))
        self._descriptors = np.zeros(len(fields), FieldDescType)
        type_ids = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
        for descriptor, (name, field) in zip(self._descriptors, fields.items(), strict=True):
            descriptor["type_id"] = type_ids[type(field)]
            descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        self._metadata = np.zeros(capacity, self._row)
        self._table = np.zeros(capacity, ALLOC_TABLE_TYPE)
        self._count, self._page = 0, PAGE
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._end = HeaderType.itemsize + self._descriptors.nbytes + self._metadata.nbytes

    def append(self, record: Record, label: int) -> None:
        """Write the next sample. Raises Unreadable for a record larger than FFCV's largest page."""
        size = len(record.data)
        page = PAGE
        while page < size:
            page *= 2
        if page > _LARGEST_PAGE:
            raise Unreadable(f"{size} bytes, the format holds {_LARGEST_PAGE}: use --max-side or --mode jpg")
        if self._end // page != (self._end + size - 1) // page:  # it would cross a page: start on the next
            self._end = -(-self._end // page) * page
        self._page = max(self._page, page)
        self._file.seek(self._end)
        self._file.write(record.data)
        row = self._metadata[self._count]
        row["f0"] = record.mode, record.width, record.height, self._end
        row["f1"] = label
        self._table[self._count] = self._count, self._end, size
        self._count += 1
        self._end += size

    def close(self) -> int:
        """Complete the file, flushed to disk."""
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"] = CURRENT_VERSION, len(self._descriptors)
        header["page_size"], header["num_samples"] = self._page, self._count
        header["alloc_table_ptr"] = self._end
        front = header.tobytes() + self._descriptors.tobytes() + self._metadata[: self._count].tobytes()
        table = self._table[: self._count].tobytes()
        self._file.seek(self._end)
        self._file.write(table)
        self._file.seek(0)
        self._file.write(front)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return zlib.crc32(table, zlib.crc32(front))

    def abort(self) -> None:
        """Close the file as it is."""
        self._file.close()


def _work(item: Item, index: int, settings: Settings) -> Record | str:
    """What a worker process does for one image: its record, or the reason it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on odd EXIF, palettes and large images, which are no errors
            return encode(item.read(), index, settings)
    except Unreadable as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _start_worker() -> None:
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
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
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
    skip_bad: int = 0,
    quiet: bool = False,
) -> Manifest:
    """Write the images of `source` to the beton `out` and its manifest beside it; return the manifest.

    Raises InputError, leaving `out` as it was, where the source or an image cannot be read; up to `skip_bad`
    unreadable images are left out instead.
    """
    settings, out = settings or Settings(), Path(out)
    if not out.parent.is_dir():
        raise InputError(f"{out}: its folder does not exist: make it with mkdir -p {out.parent}")
    if out.is_dir():
        raise InputError(f"{out}: is a folder: give the name of the file to write, such as {out / 'train.beton'}")
    images = open_source(source, subset)
    if limit:
        images = Source(_spread(images.items, limit), images.classes)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
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


def _spread(items: list[Item], limit: int) -> list[Item]:
    """Return `limit` of the items, evenly spread, so that all classes keep their share."""
    if limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


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
    found = {"python": platform.python_version()}
    for package in ("millrace", "ffcv", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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


@command
def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaving nothing half written
    args = _arguments()
    if min(args.workers, args.limit, args.skip_bad) < 0:
        raise InputError("--workers, --limit and --skip-bad must not be negative: give 0 or more")
    settings = Settings(args.max_side, args.quality, args.mode, args.jpeg_share, args.ignore_exif)
    options = {"workers": args.workers, "limit": args.limit, "subset": args.subset, "skip_bad": args.skip_bad}
    manifest = prepare(args.source, args.out, settings, **options)
    for name, reason in manifest.skipped:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    labelled = f"{len(manifest.classes)} classes" if manifest.classes else "unlabelled"
    print(f"{args.out}: {manifest.count} images, {labelled}, {manifest.file_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
