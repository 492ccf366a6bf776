"""What crops and augmentation take on the device: views a second, and milliseconds a batch.

    python -m benchmarks.crops --data F.beton [--batch 512] [--size 224] [--augmentation moco_v2] [--json OUT]

One batch of decoded images lies on the device; crops (`pipeline.augment.crop`) and augmentation
(`pipeline.augment.color`) are timed apart, by events on a GPU, by CPU time of one thread elsewhere. On a GPU these are
the Triton kernels, and the plain operations, their reference, are timed beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine
from pipeline.augment.color import IMAGENET, augment, stepwise
from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.draws import draw_views
from pipeline.augment.plan import Plan
from pipeline.beton import Beton
from pipeline.sampling.order import epoch_order
from pipeline.storage.decode import decode
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError, command
from pipeline.views import AUGMENTATIONS, view_sizes


def timed(function: Callable[[], Any], device: torch.device, runs: int) -> dict[str, float]:
    """Return median, minimum and maximum milliseconds of `function`, after two calls to warm up."""
    found = []
    for number in range(runs + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end)
        else:
            begun = time.process_time()
            function()
            taken = 1000 * (time.process_time() - begun)
        if number >= 2:
            found.append(taken)
    return machine.spread(found)


def measure(beton: Beton, *, size: int, batch: int, augmentation: str, runs: int) -> dict[str, Any]:
    """Return milliseconds a batch of crops, of the augmentation, and of its plain operations."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = AUGMENTATIONS[augmentation]
    ids = np.resize(epoch_order(0, 0, len(beton)), batch)
    sides = {"heights": beton.heights[ids], "widths": beton.widths[ids]}
    drawn = draw_views(views, seed=0, epoch=0, ids=ids, **sides)
    plan = Plan.from_draws(ids, drawn, view_sizes(views, size))
    decoded = [decode(beton, int(index)) for index in ids]
    starts = np.cumsum([0] + [image.size for image in decoded])[:-1]
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in decoded])).to(device)
    images = Ragged(pixels, starts.astype(np.int64), beton.widths[ids].astype(np.int64))
    crops = crop_views(images, plan)

    def all_views(how: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        return lambda: [how(crop, d.color, IMAGENET, kind) for crop, d in zip(crops, drawn, strict=True)]

    found: dict[str, Any] = {
        "crops": timed(lambda: crop_views(images, plan), device, runs),
        "augmentation": timed(all_views(augment), device, runs),
        "plain augmentation": timed(all_views(stepwise), device, runs),
    }
    together = found["crops"]["median"] + found["augmentation"]["median"]
    return {"milliseconds": found, "views_per_second": batch * len(views) / together * 1000, "device": device.type}


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crops", description="Time crops and augmentation.")
    parser.add_argument("--data", required=True, help="beton")
    parser.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="images a batch (default %(default)s)")
    parser.add_argument("--augmentation", default="moco_v2", choices=list(AUGMENTATIONS), help="default %(default)s")
    parser.add_argument("--runs", type=int, default=10, help="batches timed (default %(default)s)")
    machine.add_outputs(parser)
    args = parser.parse_args()
    if min(args.size, args.batch, args.runs) < 1:
        raise InputError("--size, --batch and --runs must be positive: give 1 or more")
    settings = {"size": args.size, "batch": args.batch, "augmentation": args.augmentation, "runs": args.runs}
    about = machine.describe()
    result: dict[str, Any] = {"machine": about, "data": Path(args.data).name, "settings": settings}
    result |= measure(open_data(args.data), **settings)
    machine.tell(report(result), result, args)


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table of a result."""
    rows = [[name, *machine.texts(taken, "{:.2f}")] for name, taken in result["milliseconds"].items()]
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    notes = [f"{result['data']}: {settings}", f"crops and augmentation: {result['views_per_second']:.0f} views/s"]
    return machine.Report(
        "Crops and augmentation on the device", ["ms a batch", "median", "least", "most"], rows, notes
    )


if __name__ == "__main__":
    main()
