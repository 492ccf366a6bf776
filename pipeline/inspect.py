"""Describe a beton, verify its records, preview its augmented views.

python -m pipeline.inspect FILE [--verify] [--preview out.png] [--augmentation moco_v2] [--views LIST] [--size 224]
"""

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
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
from pipeline.storage.decode import check_record, decode
from pipeline.system.cli import ArgumentParser
from pipeline.system.cores import available_cores
from pipeline.system.errors import BadRecords, InputError, command
from pipeline.system.limits import parse_yaml
from pipeline.system.progress import progress
from pipeline.system.text import counted, printable
from pipeline.views import AUGMENTATIONS, View, ViewError, changed_views

_CHUNK_RECORDS = 64  # records in a call of a thread
_COLUMNS, _GAP_PIXELS = 2, 6  # layout of the preview: groups side by side, space between pictures
_MIN_CELL_PIXELS = 96  # smaller views are enlarged in the preview
_PREVIEW_IMAGES = 12
_MAX_VIEWS, _SHOWN_CHARACTERS = 16, 200


def describe(beton: Beton) -> str:
    """Return a few lines that describe the beton."""
    sizes, sides = beton.sizes.astype(np.int64), np.stack([beton.heights, beton.widths])
    raw = int((beton.modes == RAW).sum())
    lines = [
        f"{beton.path}: {len(beton)} images, {beton.file_size / 2**20:.1f} MiB",
        f"  stored     {len(beton) - raw} JPEG, {raw} raw; bytes {_range(sizes)}, mean {sizes.mean():.0f}",
        f"  pixels     height {_range(sides[0])}, width {_range(sides[1])}",
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
    return f"{values.min()} to {values.max()} (median {int(np.median(values))})"


def _labels(beton: Beton) -> str:
    if (beton.labels < 0).all():
        return "none"
    labels, counts = np.unique(beton.labels[beton.labels >= 0], return_counts=True)
    names = beton.classes or [str(label) for label in labels]
    fewest = counts.min() if len(counts) >= len(names) else 0
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} classes of {fewest} to {counts.max()} images: {shown}"


def verify(beton: Beton, samples: Iterable[int] | None = None, *, quiet: bool = False) -> list[tuple[int, str]]:
    """Check CRC32, JPEG header and decoding of `samples`, or of all; return id and fault of every damaged record.

    Records in `beton.unreadable` are skipped.
    """
    ids = [index for index in (range(len(beton)) if samples is None else samples) if index not in beton.unreadable]
    chunks = [ids[start : start + _CHUNK_RECORDS] for start in range(0, len(ids), _CHUNK_RECORDS)]
    with ThreadPoolExecutor(available_cores()) as pool:
        faults = chain.from_iterable(pool.map(lambda chunk: [check_record(beton, index) for index in chunk], chunks))
        return [(i, fault) for i, fault in zip(progress(ids, "records", quiet=quiet), faults, strict=True) if fault]


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
    faults: list[tuple[int, str]] = []
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
        for index, fault in faults:
            print(f"bad: sample {index} ({beton.name(index)}): {fault}")
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
    return 1 if faults else 0


if __name__ == "__main__":
    main()
