"""Crops and augmentation on the device: views a second, and milliseconds a batch.

    python -m benchmarks.crops --data F.beton [--batch 512] [--size 224] [--augmentation moco_v2] [--kernels]
        [--json OUT]

One batch of decoded images lies on the device. Crops (`pipeline.augment.crop`) and augmentation
(`pipeline.augment.color`) are timed separately: by events on a GPU, by CPU time of one thread elsewhere. A GPU runs
Triton kernels, a CPU compiled code; the reference of both, the plain operations, is timed too. With --kernels the
profiler names each kernel (on a CPU each operation of torch) and its time.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, require_positive
from benchmarks.common.kernels import kernel_times
from benchmarks.common.table import Report, publish, spread, spread_cells
from pipeline.augment.color import IMAGENET, augment, stepwise
from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.draws import draw_views
from pipeline.augment.plan import Plan
from pipeline.beton import Beton
from pipeline.sampling import order
from pipeline.storage.decode import decode
from pipeline.storage.in_place import open_data
from pipeline.system.errors import command
from pipeline.views import AUGMENTATIONS, view_sizes

_WARMUP_CALLS = 2


def milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call, on a GPU by events, else CPU time."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.process_time()
    function()
    return 1000 * (time.process_time() - begin)


def measure(
    beton: Beton, *, size: int, batch: int, augmentation: str, runs: int, kernels: bool = False
) -> dict[str, Any]:
    """Return milliseconds a batch of crops, of the augmentation, of its plain operations and, if asked, each kernel."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = AUGMENTATIONS[augmentation]
    ids = order.ids("random", 0, 0, len(beton), np.arange(batch) % len(beton))
    sides = {"heights": beton.heights[ids], "widths": beton.widths[ids]}
    draws = draw_views(views, seed=0, epoch=0, ids=ids, **sides)
    plan = Plan.from_draws(ids, draws, view_sizes(views, size))
    decoded = [decode(beton, int(index)) for index in ids]
    starts = np.cumsum([0] + [image.size for image in decoded])[:-1]
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in decoded])).to(device)
    images = Ragged(pixels, starts.astype(np.int64), beton.widths[ids].astype(np.int64))
    crops = crop_views(images, plan)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def all_views(operation: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        return lambda: [operation(crop, d.color, IMAGENET, dtype) for crop, d in zip(crops, draws, strict=True)]

    def timed(function: Callable[[], Any]) -> dict[str, float]:
        return spread([milliseconds(function, device) for _ in range(_WARMUP_CALLS + runs)][_WARMUP_CALLS:])

    taken = {
        "crops": timed(lambda: crop_views(images, plan)),
        "augmentation": timed(all_views(augment)),
        "plain augmentation": timed(all_views(stepwise)),
    }
    medians = {name: times["median"] for name, times in taken.items()}
    total = medians["crops"] + medians["augmentation"]
    result = {"milliseconds": taken, "views_per_second": batch * len(views) / total * 1000, "device": device.type}
    result["augmented_per_second"] = batch * len(views) / medians["augmentation"] * 1000
    if kernels:
        work = {"crops": lambda: crop_views(images, plan), "augmentation": all_views(augment)}
        result["kernels"] = {name: kernel_times(call, device, runs) for name, call in work.items()}
    return result


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows = [[name, *spread_cells(taken, "{:.2f}")] for name, taken in result["milliseconds"].items()]
    rows += [
        [f"{part}: {name}", f"{row['milliseconds']:.3f}", f"{row['calls']:g} calls", ""]
        for part, kernels in result.get("kernels", {}).items()
        for name, row in kernels.items()
    ]
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    rates = (
        f"{result['views_per_second']:.0f} views/s; augmentation alone: {result['augmented_per_second']:.0f} views/s"
    )
    notes = [f"{result['data']}: {settings}", f"crops and augmentation: {rates}"]
    return Report("Crops and augmentation on the device", ["ms a batch", "median", "min", "max"], rows, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("crops", "Time crops and augmentation.")
    parser.add_argument("--data", required=True, help="beton")
    parser.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="images a batch (default %(default)s)")
    parser.add_argument("--augmentation", default="moco_v2", choices=list(AUGMENTATIONS), help="default %(default)s")
    parser.add_argument("--kernels", action="store_true", help="time each kernel")
    parser.add_argument("--runs", type=int, default=10, help="batches timed (default %(default)s)")
    return parser


@command
def main() -> None:
    args = parser().parse_args()
    require_positive(args, "size", "batch", "runs")
    settings = {"size": args.size, "batch": args.batch, "augmentation": args.augmentation, "runs": args.runs}
    about, taken = machine.describe(), measure(open_data(args.data), **settings, kernels=args.kernels)
    publish(report, args, machine=about, data=Path(args.data).name, settings=settings, **taken)


if __name__ == "__main__":
    main()
