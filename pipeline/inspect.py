"""Describe a beton, verify its records, preview its augmented views, rewrite a former version's manifest.

python -m pipeline.inspect FILE [--verify] [--preview out.png] [--augmentation moco_v2] [--views LIST] [--size 224]
python -m pipeline.inspect FILE --upgrade
"""

import contextlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps

from pipeline.augment.color import IMAGENET
from pipeline.beton import Beton
from pipeline.beton_format import RAW
from pipeline.loader import Loader
from pipeline.manifest import FORMAT, columns_path, find_manifest
from pipeline.storage.decode import check_record, decode
from pipeline.system.chunks import chunks
from pipeline.system.cli import ArgumentParser
from pipeline.system.cores import available_cores
from pipeline.system.errors import BadRecords, InputError, command
from pipeline.system.files import atomic_path
from pipeline.system.limits import MAX_CLASSES, parse_yaml
from pipeline.system.progress import progress_bar
from pipeline.system.text import counted, printable
from pipeline.views import AUGMENTATIONS, View, ViewError, changed_views

_CHUNK_RECORDS, _CHUNKS_AHEAD = 64, 4  # records in a call of a thread, calls that wait for each thread
_COLUMNS, _GAP_PIXELS = 2, 6  # layout of the preview: groups side by side, space between pictures
_MIN_CELL_PIXELS = 96  # smaller views are enlarged in the preview
_PREVIEW_IMAGES = 12
_MAX_VIEWS, _SHOWN_CHARACTERS = 16, 200


def describe(beton: Beton) -> str:
    """Return a few lines that describe the beton."""
    raw = sum(int((beton.modes[rows] == RAW).sum()) for rows in chunks(len(beton)))
    mean = sum(int(beton.sizes[rows].sum()) for rows in chunks(len(beton))) / len(beton)
    lines = [
        f"{beton.path}: {len(beton)} images, {beton.file_size / 2**20:.1f} MiB",
        f"  stored     {len(beton) - raw} JPEG, {raw} raw; bytes {_range(beton.sizes)}, mean {mean:.0f}",
        f"  pixels     height {_range(beton.heights)}, width {_range(beton.widths)}",
        f"  labels     {_labels(beton)}",
    ]
    if beton.manifest is None:
        return "\n".join(map(printable, [*lines, "  manifest   none: bytes cannot be checked against CRCs"]))
    settings = ", ".join(f"{key} {value}" for key, value in beton.manifest.settings.items())
    versions = ", ".join(f"{key} {value}" for key, value in beton.manifest.versions.items())
    if beton.manifest.mean:
        lines.append(f"  colors     mean {beton.manifest.mean}, standard deviation {beton.manifest.std}")
    skipped = [f"  skipped    {name}: {reason}" for name, reason in beton.manifest.skipped]
    return "\n".join(map(printable, [*lines, f"  written    {settings}", f"  with       {versions}", *skipped]))


def _range(values: np.ndarray) -> str:
    middle = _ranked(values, (len(values) - 1) // 2), _ranked(values, len(values) // 2)
    return f"{values.min()} to {values.max()} (median {sum(middle) // 2})"


def _ranked(values: np.ndarray, rank: int) -> int:
    """Return the value number `rank`, from 0, of unsigned integers [n] in sorted order, in constant memory.

    Sixteen bits at a time, from the highest: counts of the values that agree with it in all bits before.
    """
    value = 0
    for shift in range(-(-int(values.max()).bit_length() // 16) * 16 - 16, -1, -16):
        counts = np.zeros(1 << 16, np.int64)
        for rows in chunks(len(values)):
            part = values[rows].astype(np.uint64) >> np.uint64(shift)
            part = part[part >> np.uint64(16) == value]
            counts += np.bincount((part & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, "right"))
        rank -= int(ends[digit] - counts[digit])
        value = value << 16 | digit
    return value


def _labels(beton: Beton) -> str:
    if beton.labels.max() < 0:
        return "none"
    labels, counts = _counted(beton.labels)
    names = beton.classes or [str(label) for label in labels]
    fewest = counts.min() if len(counts) >= len(names) else 0
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} classes of {fewest} to {counts.max()} images: {shown}"


def _counted(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels from 0 on, in order, and the number of images of each."""
    if labels.max() >= MAX_CLASSES:  # forged
        return np.unique(labels[labels >= 0], return_counts=True)
    counts = np.zeros(int(labels.max()) + 1, np.int64)
    for rows in chunks(len(labels)):
        part = labels[rows]
        counts += np.bincount(part[part >= 0], minlength=len(counts))
    present = np.flatnonzero(counts)
    return present, counts[present]


def verify(beton: Beton, samples: Sequence[int] | None = None, *, quiet: bool = False) -> list[tuple[int, str]]:
    """Check CRC32, JPEG header and decoding of `samples`, or of all; return id and fault of every damaged record.

    Records in `beton.unreadable` are skipped.
    """
    ids = range(len(beton)) if samples is None else samples
    faults: list[tuple[int, str]] = []

    def check(rows: slice) -> list[tuple[int, str]]:
        checked = [index for index in ids[rows] if index not in beton.unreadable]
        return [(index, fault) for index in checked if (fault := check_record(beton, index))]

    cores = available_cores()
    with ThreadPoolExecutor(cores) as pool:
        under_way: deque[Future] = deque()
        with progress_bar(len(ids), "records", quiet=quiet) as bar:
            for rows in chunks(len(ids), _CHUNK_RECORDS):
                under_way.append(pool.submit(check, rows))
                if len(under_way) > _CHUNKS_AHEAD * cores:
                    faults += under_way.popleft().result()
                    bar.update(_CHUNK_RECORDS)
            for future in under_way:
                faults += future.result()
            bar.update(len(ids) - bar.n)
    return faults


def upgrade(path: Path | str) -> bool:
    """Rewrite the manifest of a beton in the present format; return whether it was in the former one.

    Columns are written first, so that a crash leaves the former manifest. Raises InputError.
    """
    beton = Beton(path)
    if beton.manifest is None or beton.columns is None:
        raise InputError(f"{path}: has no manifest: write it again with python -m pipeline.prepare")
    if beton.manifest.format == FORMAT:
        return False
    manifest = find_manifest(beton.path)
    try:
        with atomic_path(manifest) as manifest_file, atomic_path(columns_path(manifest)) as columns_file:
            columns = beton.columns.write(columns_file)
            replace(beton.manifest, columns=columns, format=FORMAT).write(manifest_file)
    except OSError as error:
        raise InputError(
            f"{manifest}: cannot be written: {error.strerror or error}: make its folder writable"
        ) from None
    return True


def preview(
    beton: Beton,
    views: Sequence[View],
    *,
    size: int,
    seed: int = 0,
    epoch: int = 0,
    count: int = _PREVIEW_IMAGES,
    backend: str = "ffcv",
) -> Image.Image:
    """Return a picture of `count` images, the first of the epoch, each with its augmented views of `size` pixels."""
    batch = min(count, len(beton))
    options: dict[str, Any] = {"backend": backend, "workers": 1, "prefetch_factor": 1}
    loader = Loader(beton, tuple(views), seed=seed, size=size, batch=batch, **options)
    with contextlib.closing(loader):
        loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
        drawn = next(iter(loader))
    pixels = [_pixels(view) for view in drawn.views if view is not None]
    originals = [decode(beton, int(index)) for index in drawn.ids]
    return _grid(list(zip(originals, *pixels, strict=True)), size)


def _pixels(views: torch.Tensor) -> np.ndarray:
    """Return normalized views [B, 3, S, S] as uint8 [B, S, S, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return ((views * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _grid(groups: Sequence[Sequence[np.ndarray]], size: int) -> Image.Image:
    """Return groups of pictures in `_COLUMNS` columns, each fitted into a white square of `size` pixels."""
    scale = max(1, _MIN_CELL_PIXELS // size)
    cell, rows = size * scale + _GAP_PIXELS, -(-len(groups) // _COLUMNS)
    group_width = len(groups[0]) * cell + 2 * _GAP_PIXELS
    grid = Image.new("RGB", (_COLUMNS * group_width, rows * cell + _GAP_PIXELS), "white")
    for number, group in enumerate(groups):
        row, column = divmod(number, _COLUMNS)
        for position, pixels in enumerate(group):
            square = ImageOps.pad(Image.fromarray(pixels), (size, size), color="white")
            picture = square.resize((size * scale, size * scale), Image.Resampling.NEAREST)
            left, top = column * group_width + position * cell, row * cell
            grid.paste(picture, (left + _GAP_PIXELS, top + _GAP_PIXELS))
    return grid


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="python -m pipeline.inspect", description="Describe, verify or preview a beton.")
    add = parser.add_argument
    add("file", metavar="FILE", help="beton")
    add("--verify", action="store_true", help="check and decode every record; exit status 1 if one is damaged")
    add("--upgrade", action="store_true", help="rewrite a manifest of a former version in the present format")
    add("--preview", metavar="PNG", type=Path, help="draw images with their augmented views")
    add("--augmentation", default="moco_v2", choices=list(AUGMENTATIONS), help="default %(default)s")
    add("--views", metavar="LIST", help="changes of each view, as in data.views, such as '[{hue: 0}, {}]'")
    add("--size", type=int, default=224, help="side of a view, pixels (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the order and the augmentation (default %(default)s)")
    add("--epoch", type=int, default=0, help="epoch of the order and the augmentation (default %(default)s)")
    add("--count", type=int, default=_PREVIEW_IMAGES, help="images in the preview (default %(default)s)")
    return parser


def _views(text: str, augmentation: str) -> tuple[View, ...]:
    """Return the views of --views. Raises InputError."""
    try:
        given = parse_yaml(text)
    except (ValueError, yaml.YAMLError):
        given = None
    listed = isinstance(given, list) and all(isinstance(view, dict) for view in given)
    if not listed or not 1 <= len(given) <= _MAX_VIEWS:
        remedy = f"give 1 to {_MAX_VIEWS} mappings, one for each view, such as '[{{hue: 0}}, {{}}]'"
        raise InputError(f"--views {text[:_SHOWN_CHARACTERS]!r}: {remedy}")
    try:
        return changed_views(given, augmentation)
    except ViewError as error:
        raise InputError(f"--views {error}") from None


@command
def main() -> int:
    args = parser().parse_args()
    if min(args.size - 8, args.count - 1, args.seed, args.epoch) < 0 or args.size > 1024 or args.count > 1000:
        raise InputError("--size is 8 to 1024, --count 1 to 1000, --seed and --epoch 0 or more: choose such values")
    views = AUGMENTATIONS[args.augmentation] if args.views is None else _views(args.views, args.augmentation)
    if args.upgrade:
        state = "rewritten in" if upgrade(args.file) else "already has"
        print(f"{find_manifest(Path(args.file))}: {state} the present format")
        return 0
    faults: list[tuple[int, str]] = []
    altered: list[str] = []
    try:
        beton = Beton(args.file)
    except BadRecords as error:
        if not args.verify:
            raise
        faults = error.faults
        beton = Beton(args.file, tolerate=True)  # raises if no record is readable
    print(describe(beton))
    if args.verify:
        faults = sorted([*faults, *verify(beton)])
        if beton.manifest and beton.columns and beton.manifest.columns:
            altered = beton.columns.faults(beton.manifest.columns)
        for index, fault in faults:
            print(f"bad: sample {index} ({beton.name(index)}): {fault}")
        for name in altered:
            print(f"bad: column {name}: its bytes changed since they were written (CRC32 differs)")
        state = "are intact" if beton.manifest else "decode; without a manifest their bytes are not checked"
        print(f"verified: {len(beton) - len(faults)} of {len(beton)} records {state}")
    if args.preview:
        picture = preview(beton, views, size=args.size, count=args.count, seed=args.seed, epoch=args.epoch)
        try:
            picture.save(args.preview)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{args.preview}: cannot be written ({error}): give a .png or .jpg file in a folder that exists"
            ) from None
        print(f"preview: {args.preview} (each original with its {counted(len(views), 'view')})")
    return 1 if faults or altered else 0


if __name__ == "__main__":
    main()
