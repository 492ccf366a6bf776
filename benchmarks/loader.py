"""Loader throughput: our two-view path beside FFCV's own loader decoding every image twice, in one run.

    python -m benchmarks.loader --data F.beton [--size 224] [--threads 1] [--runs 5] [--json OUT.json]

Counted in pairs of crops a second of CPU time (all threads of the process) and of wall clock; crops only, before any
colour operation. The two alternate, `--runs` times each after one warm-up, over the same images; medians and their
spread are printed, and the ratio is of medians. The file is read once before, so that it stands in the page cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from pipeline.backends import Plan, build
from pipeline.beton import Beton
from pipeline.draws import draw_view
from pipeline.errors import InputError, command
from pipeline.order import epoch_order
from pipeline.views import AUGMENTATIONS

_AHEAD = 3
Epoch = Callable[[], int]


def ours(beton: Beton, size: int, batch: int, threads: int) -> tuple[Epoch, Callable[[], None]]:
    """Return a function that crops one epoch and returns its number of pairs, and one that closes the backend."""
    views = AUGMENTATIONS["moco_v2"]
    device = torch.device("cpu")
    backend = build("ffcv", beton, sizes=(size, size), batch=batch, workers=threads, depth=_AHEAD, device=device)

    def plan(ids: np.ndarray) -> Plan:
        sides = {"heights": beton.heights[ids], "widths": beton.widths[ids]}
        drawn = [draw_view(view, index, seed=0, epoch=0, ids=ids, **sides) for index, view in enumerate(views)]
        return Plan(ids, np.stack([d.boxes for d in drawn]), np.stack([d.flips for d in drawn]))

    def epoch() -> int:
        order = epoch_order(0, 0, len(beton))
        parts = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
        for part in parts[:_AHEAD]:
            backend.submit(plan(part))
        for number in range(len(parts)):
            backend.receive(timeout=600)
            if number + _AHEAD < len(parts):
                backend.submit(plan(parts[number + _AHEAD]))
        return len(parts) * batch

    return epoch, backend.close


def ffcv_twice(beton: Beton, size: int, batch: int, threads: int) -> tuple[Epoch, Callable[[], None]]:
    """Return the same for FFCV's own loader: two pipelines on one image field, each decoding and cropping."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    def decoder() -> Any:
        return RandomResizedCropRGBImageDecoder((size, size), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))

    loader = Loader(
        str(beton.path),
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        seed=0,
        batches_ahead=_AHEAD,
        pipelines={
            "image": PipelineSpec("image", decoder=decoder(), transforms=[]),
            "second": PipelineSpec("image", decoder=decoder(), transforms=[]),
            "label": None,
        },
    )

    def epoch() -> int:
        return sum(len(views[0]) for views in loader)

    return epoch, lambda: None


def measure(beton: Beton, *, size: int, batch: int, threads: int, runs: int) -> dict[str, Any]:
    """Return pairs a second, by CPU time and wall clock, of both paths and the ratio of the CPU-time medians."""
    paths = {}
    for name, make in (("ours", ours), ("ffcv_twice", ffcv_twice)):
        paths[name] = make(beton, size, batch, threads)
        # Compiles, and fills the page cache. Ours goes first: FFCV's Loader changes a type object that all of numba
        # shares (OSCacheManager.state_type), after which nothing else can be compiled reliably in the process.
        paths[name][0]()
    rates: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in paths}
    for _ in range(runs):
        for name, (epoch, _) in paths.items():
            cpu, wall = time.process_time(), time.perf_counter()
            pairs = epoch()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            rates[name]["cpu"].append(pairs / cpu)
            rates[name]["wall"].append(pairs / wall)
    for _, close in paths.values():
        close()
    result: dict[str, Any] = {
        name: {kind: machine.spread(values) for kind, values in kinds.items()} for name, kinds in rates.items()
    }
    return result | {"ratio": result["ours"]["cpu"]["median"] / result["ffcv_twice"]["cpu"]["median"]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description="Measure loader throughput.")
    parser.add_argument("--data", required=True, help="beton")
    parser.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="images a batch (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="loader threads (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="epochs measured of each (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


@command
def main() -> None:
    args = _arguments()
    if min(args.size, args.batch, args.threads, args.runs) < 1:
        raise InputError("--size, --batch, --threads and --runs must be positive: give 1 or more")
    beton = Beton(args.data)
    if args.batch > len(beton):
        raise InputError(f"--batch {args.batch}: {args.data} holds {len(beton)} images: give at most as many")
    settings = {"size": args.size, "batch": args.batch, "threads": args.threads, "runs": args.runs}
    result = {
        "machine": machine.describe(),
        "data": Path(args.data).name,
        "settings": settings,
        **measure(beton, **settings),
    }
    about = result["machine"]
    print(f"{about['processor']}, {about['cores']} cores, load {about['load']}, {about['date']}")
    print(", ".join(f"{name} {number}" for name, number in about["versions"].items()))
    print(f"{args.data}: {len(beton)} images, {settings}")
    for name in ("ours", "ffcv_twice"):
        for kind in ("cpu", "wall"):
            rate = result[name][kind]
            print(f"{name:11s} {rate['median']:7.0f} pairs/s {kind:4s} ({rate['min']:.0f} to {rate['max']:.0f})")
    print(f"ratio       {result['ratio']:7.2f} by CPU time")
    machine.write(result, args.json)


if __name__ == "__main__":
    main()
