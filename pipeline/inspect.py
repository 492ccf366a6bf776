"""What a beton holds, whether it is whole, and what its augmented views look like.

python -m pipeline.inspect FILE [--verify] [--preview out.png] [--augmentation moco_v2] [--size 224]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.augment.color import IMAGENET, augment
from pipeline.augment.draws import draw_views
from pipeline.augment.plan import Plan
from pipeline.backends import build
from pipeline.backends.base import BackendConfig
from pipeline.beton import Beton
from pipeline.native.libffcv import RAW
from pipeline.sampling.order import epoch_order
from pipeline.storage.decode import check_record, decode
from pipeline.system.cores import available_cores
from pipeline.system.errors import BadRecords, InputError, command
from pipeline.system.progress import progress
from pipeline.system.text import printable
from pipeline.views import AUGMENTATIONS, View, view_sizes

_CHUNK = 64  # records a thread checks at a time
_COLUMNS, _GAP, _SHOWN = 2, 6, 12  # groups side by side, pixels between pictures, images shown


def describe(beton: Beton) -> str:
    """Return a few lines on what `beton` holds."""
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
    left_out = [f"  left out   {name}: {reason}" for name, reason in beton.manifest.skipped]
    return "\n".join(map(printable, [*lines, f"  written    {settings}", f"  with       {versions}", *left_out]))


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
    """Return sample id and fault of every damaged record of `samples`, or of all: CRC32, JPEG header, decoding.

    Those that the beton's tables say to be unreadable are left out.
    """
    ids = [index for index in (range(len(beton)) if samples is None else samples) if index not in beton.unreadable]
    chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
    with ThreadPoolExecutor(available_cores()) as pool:
        checked = pool.map(lambda chunk: [check_record(beton, index) for index in chunk], chunks)
        faults = chain.from_iterable(checked)
        return [(i, fault) for i, fault in zip(progress(ids, "records", quiet=quiet), faults, strict=True) if fault]


def preview(
    beton: Beton, views: Sequence[View], *, size: int, seed: int = 0, epoch: int = 0, count: int = _SHOWN
) -> Image.Image:
    """Return a picture of `count` images, the first of the epoch, each beside its augmented views."""
    ids = epoch_order(seed, epoch, len(beton))[:count]
    count = len(ids)
    sides = {"heights": beton.heights[ids], "widths": beton.widths[ids]}
    drawn = draw_views(views, seed=seed, epoch=epoch, ids=ids, **sides)
    backend = build("ffcv", beton, BackendConfig(view_sizes(views, size), count, 1, 1, torch.device("cpu")))
    try:
        backend.submit(Plan.from_draws(ids, drawn, view_sizes(views, size)))
        crops = backend.receive(timeout=60)
        seen = [_pixels(augment(crop, d.color)) for crop, d in zip(crops, drawn, strict=True)]
        seen = [view if view.shape[1] == size else np.stack([_fit(image, size) for image in view]) for view in seen]
    finally:
        backend.close()
    groups = [[_fit(decode(beton, int(index)), size), *(view[i] for view in seen)] for i, index in enumerate(ids)]
    return _grid(groups, size)


def _pixels(views: torch.Tensor) -> np.ndarray:
    """Return normalized views [B, 3, S, S] as uint8 [B, S, S, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return ((views * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    """Return `image` shrunk or grown into a white square of `size` pixels."""
    picture = Image.fromarray(image)
    share = size / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * share)), max(1, round(picture.height * share))))
    square = Image.new("RGB", (size, size), "white")
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(square)


def _grid(groups: list[list[np.ndarray]], size: int) -> Image.Image:
    scale = max(1, 96 // size)  # small images are shown enlarged
    cell, wide = size * scale + _GAP, len(groups[0])
    rows = -(-len(groups) // _COLUMNS)
    grid = Image.new("RGB", (_COLUMNS * (wide * cell + 2 * _GAP), rows * cell + _GAP), "white")
    for number, group in enumerate(groups):
        row, column = divmod(number, _COLUMNS)
        for place, picture in enumerate(group):
            at = (column * (wide * cell + 2 * _GAP) + place * cell + _GAP, row * cell + _GAP)
            grid.paste(Image.fromarray(picture).resize((size * scale,) * 2, Image.Resampling.NEAREST), at)
    return grid


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.inspect", description="Describe, verify or preview a beton."
    )
    parser.add_argument("file", metavar="FILE", help="beton")
    parser.add_argument(
        "--verify", action="store_true", help="check and decode every record; exit status 1 if one is bad"
    )
    parser.add_argument("--preview", metavar="PNG", type=Path, help="draw images beside their augmented views")
    parser.add_argument("--augmentation", default="moco_v2", choices=list(AUGMENTATIONS), help="default %(default)s")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the views' augmentation (default %(default)s)")
    parser.add_argument("--epoch", type=int, default=0, help="likewise (default %(default)s)")
    parser.add_argument("--count", type=int, default=_SHOWN, help="images in the preview (default %(default)s)")
    return parser.parse_args()


@command
def main() -> int:
    args = _arguments()
    if min(args.size - 8, args.count - 1, args.seed, args.epoch) < 0 or args.size > 1024 or args.count > 1000:
        raise InputError("--size is 8 to 1024, --count 1 to 1000, --seed and --epoch 0 or more: choose such values")
    faults: list[tuple[int, str]] = []
    try:
        beton = Beton(args.file)
    except BadRecords as error:
        if not args.verify:
            raise
        faults = error.faults
        beton = Beton(args.file, tolerate=True)  # raises where no record can be read
    print(describe(beton))
    if args.preview:
        picture = preview(
            beton,
            AUGMENTATIONS[args.augmentation],
            size=args.size,
            seed=args.seed,
            epoch=args.epoch,
            count=args.count,
        )
        try:
            picture.save(args.preview)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{args.preview}: cannot be written ({error}): give a .png or .jpg file in a folder that exists"
            ) from None
        print(f"preview: {args.preview} (each original beside its {len(AUGMENTATIONS[args.augmentation])} views)")
    if not args.verify:
        return 0
    bad = sorted([*faults, *verify(beton)])
    for index, fault in bad:
        print(f"bad: sample {index} ({beton.name(index)}): {fault}")
    how = "are whole" if beton.manifest else "decode; without a manifest their bytes are not checked"
    print(f"verified: {len(beton) - len(bad)} of {len(beton)} records {how}")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
