"""Training steps a second: ours, eager, compiled and as a CUDA graph, and other implementations of MoCo.

    python -m benchmarks.step [--ways eager,compiled,graph,official,...] [--runs 10] [--json OUT]
        --config engine/recipes/moco_v2_in1k.yaml [--data.batch 64] [any setting of a run]

The ways take steps in turn on the same batch, which lies on the device; medians and spread of wall clock, and of CPU
time where there is no GPU. Then each part of our step alone: encoders, loss with its terms, moving average, queue,
optimiser, augmentation. `graph` is compiled, and replayed as one CUDA graph. `official` is facebookresearch/moco's
training loop, in float32 and NCHW as published, without its shuffling; `lightly` lightly's MoCo, where it is installed;
`official-amp` and `lightly-amp` the same under autocast.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.peers import PEERS
from engine.arguments import parse
from engine.build import DTYPES, Model, build_accelerator, build_model
from engine.config import Settings
from engine.graph import WARM
from methods.base import Embeddings, total
from pipeline.augment import IMAGENET, augment
from pipeline.cores import available_cores
from pipeline.draws import draw_colour
from pipeline.errors import InputError, command
from pipeline.loader import Batch
from pipeline.views import AUGMENTATIONS

Call = Callable[[], Any]
OURS = ("eager", "compiled", "graph")
WAYS = (*OURS, *(f"{peer}{amp}" for peer in PEERS for amp in ("", "-amp")))


def batch_of(settings: Settings, device: torch.device) -> Batch:
    """Return random views as the loader hands them out, in the precision of the encoder."""
    dtype = DTYPES[settings.precision]
    side, count = settings.data.size, settings.data.batch
    generator = torch.Generator().manual_seed(0)
    views = tuple(
        torch.randn(count, 3, side, side, generator=generator).to(device, dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    return Batch(views, np.arange(count), 0, 0, 0.0)


def ways(settings: Settings, chosen: list[str], accelerator: Accelerator) -> tuple[dict[str, Call], Model]:
    """Return the steps to compare, by name, and our eager model."""
    device, batch = accelerator.device, batch_of(settings, accelerator.device)
    a, b = batch.views
    assert a is not None
    assert b is not None
    ours = build_model(replace(settings, compile=False), accelerator)
    found: dict[str, Call] = {}
    for name in chosen:
        if name == "eager":
            found[name] = lambda: ours.step(batch)
        elif name in OURS:
            model = build_model(replace(settings, compile=True, cuda_graph=name == "graph"), accelerator)
            found[name] = lambda model=model: model.step(batch)  # type: ignore[misc]
        else:
            peer, _, amp = name.partition("-")
            theirs = PEERS[peer](ours.step.encoder, settings, device, torch.bfloat16 if amp else None)
            pair = a.float().contiguous(), b.float().contiguous()
            found[name] = lambda theirs=theirs, pair=pair: theirs.step(pair)  # type: ignore[misc]
    return found, ours


def parts(settings: Settings, model: Model, accelerator: Accelerator) -> dict[str, Call]:
    """Return each part of our step alone, by name."""
    device, batch = accelerator.device, batch_of(settings, accelerator.device)
    moving = model.step.moving_average
    dim, count = settings.model.dim, settings.data.batch
    assert dim is not None
    needs = {name.lower() for name in model.step.objective.needs}
    named = {name: F.normalize(torch.randn(count, dim, device=device), dim=1) for name in needs}
    named |= {name.upper(): value for name, value in named.items()}
    views = {int(name[1]): batch.views[int(name[1]) - 1] for name in needs}
    queries = [views[n] for n in sorted({int(name[1]) for name in needs if name[0] == "q"})]
    keys = [views[n] for n in sorted({int(name[1]) for name in needs if name[0] == "k"})]

    def encode_keys() -> None:
        with torch.no_grad(), accelerator.autocast():
            model.target(*keys)  # type: ignore[misc]

    def encode_queries() -> None:
        model.optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            torch.stack([q.float().sum() for q in model.online(*queries)]).sum().backward()

    def loss() -> None:
        leaves = {name: value.detach().requires_grad_(name[0] in "qQ") for name, value in named.items()}
        queue = None if model.queue is None else model.queue.keys
        total(model.step.objective(Embeddings(leaves, queue, 0))).backward()

    online, buffers = model.step.encoder, model.step.buffers

    def guard() -> None:
        kept = buffers.kept()
        norm = get_total_norm([p.grad for p in online.parameters() if p.grad is not None])
        buffers.restore_unless(norm.isfinite(), kept)

    crops = torch.randint(0, 256, (count, settings.data.size, settings.data.size, 3), dtype=torch.uint8, device=device)
    colours = [
        draw_colour(view, number, seed=0, epoch=0, ids=np.arange(count))
        for number, view in enumerate(AUGMENTATIONS[settings.data.augmentation])
    ]
    found: dict[str, Call] = {"encoder, queries": encode_queries}
    if model.target is not None and moving is not None:
        found |= {"encoder, keys": encode_keys, "moving average": lambda: moving.update(model.step.schedule.share)}
    if model.queue is not None:
        fresh = named.get("k2", next(iter(named.values())))
        found["queue"] = lambda: model.queue.write(fresh)  # type: ignore[union-attr]
    found |= {
        "loss and terms": loss,
        "guard": guard,
        "optimiser": model.optimiser.optimizer.step,
        "augmentation": lambda: [augment(crops, colour, IMAGENET, DTYPES[settings.precision]) for colour in colours],
    }
    return found


def clock(call: Call, device: torch.device) -> dict[str, float]:
    """Return seconds of wall clock, and of CPU time, that a call takes; on a GPU also the bytes it takes besides."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return taken | ({"bytes": torch.cuda.max_memory_allocated() - before} if on_gpu else {})


def in_turn(calls: dict[str, Call], device: torch.device, runs: int, warm: int = WARM + 1) -> dict[str, Any]:
    """Return median, minimum and maximum seconds of each, called one after another, `runs` times after the warm-up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for run in range(warm + runs):
        for name, call in calls.items():
            taken = clock(call, device)
            if run >= warm:
                found[name].append(taken)
    return {
        name: {kind: machine.spread([taken[kind] for taken in all_]) for kind in all_[0]}
        for name, all_ in found.items()
    }


def matrix_rate(device: torch.device, dtype: torch.dtype, runs: int = 5) -> float:
    """Return the TFLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = {"product": lambda: torch.mm(a, b)}
    return 2 * side**3 / in_turn(product, device, runs)["product"]["wall"]["median"] / 1e12


def measure(settings: Settings, chosen: list[str], runs: int) -> dict[str, Any]:
    """Return seconds of each way's step, of each part of ours, and what follows from them."""
    accelerator = build_accelerator(replace(settings, tracker="none"))
    device = accelerator.device
    steps, ours = ways(settings, chosen, accelerator)
    with FlopCounterMode(display=False) as counter:
        ours.step(batch_of(settings, device))
    flops = counter.get_total_flops()
    whole = in_turn(steps, device, runs)
    rate = matrix_rate(device, DTYPES[settings.precision])
    alone = in_turn(parts(settings, ours, accelerator), device, runs)
    kind, batch = "wall" if device.type == "cuda" else "cpu", settings.data.batch
    median = {name: taken[kind]["median"] for name, taken in whole.items()}
    encoders = sum(taken[kind]["median"] for name, taken in alone.items() if name.startswith("encoder"))
    others = sum(taken[kind]["median"] for name, taken in alone.items() if not name.startswith("encoder"))
    return {
        "device": device.type,
        "clock": kind,
        "ways": whole,
        "parts": alone,
        "pairs_per_second": {name: batch / taken["wall"]["median"] for name, taken in whole.items()},
        "ratio_to_official": {n: median["official"] / taken for n, taken in median.items() if "official" in median},
        "share_beside_the_encoders": others / (encoders + others),
        "flops_a_step": flops,
        "tflops": {name: flops / taken["wall"]["median"] / 1e12 for name, taken in whole.items()},
        "matrix_tflops": rate,
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(box=None)
    for heading in ("", "ms a step", "CPU ms", "pairs/s", "TFLOP/s", "of a matrix's", "GiB", "to official"):
        table.add_column(heading, justify="left" if not heading else "right")
    spread = "{median:.1f} ({min:.1f}-{max:.1f})"
    for name, taken in result["ways"].items():
        shown = [spread.format(**{k: 1000 * v for k, v in taken[kind].items()}) for kind in ("wall", "cpu")]
        ratio = result["ratio_to_official"].get(name)
        rates = f"{result['pairs_per_second'][name]:.1f}", f"{result['tflops'][name]:.2f}"
        share = f"{result['tflops'][name] / result['matrix_tflops']:.0%}"
        memory = f"{taken['bytes']['median'] / 2**30:.2f}" if "bytes" in taken and name != "graph" else ""
        table.add_row(name, *shown, *rates, share, memory, f"{ratio:.2f}" if ratio else "")
    for name, taken in result["parts"].items():
        shown = [spread.format(**{k: 1000 * v for k, v in taken[kind].items()}) for kind in ("wall", "cpu")]
        table.add_row(f"  {name}", *shown)
    Console(width=140).print(table)
    print(f"all but the encoders: {result['share_beside_the_encoders']:.1%} of the parts' {result['clock']} time")


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time training steps.")
    parser.add_argument(
        "--ways", default="eager,compiled,official,official-amp", help=f"of {', '.join(WAYS)} (default %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=10, help="steps timed of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU (default: all cores)")
    parser.add_argument("--json", type=Path, help="write the result here")
    args, rest = parser.parse_known_args()
    chosen = args.ways.split(",")
    for name in chosen:
        if name not in WAYS:
            raise InputError(f"--ways {name}: choose of {', '.join(WAYS)}")
        if name.startswith("lightly") and importlib.util.find_spec("lightly") is None:
            raise InputError(f"--ways {name}: lightly is not installed: pip install lightly, or leave it out")
    if args.runs < 1 or args.threads < 0:
        raise InputError("--runs must be positive and --threads not negative: give 1 or more")
    settings = parse(rest)
    if settings.method.name != "moco_v2" and not set(chosen) <= set(OURS):
        raise InputError(
            f"--ways {args.ways}: the other loops are MoCo v2's: leave them out for {settings.method.name}"
        )
    torch.set_num_threads(args.threads or available_cores())
    about = machine.describe()
    result: dict[str, Any] = {"machine": about, "arguments": rest} | measure(settings, chosen, args.runs)
    print(f"{about['processor']}, {about['cores']} cores, load {about['load']}, {about['gpu'] or 'no GPU'}")
    print(f"{about['date']}, {' '.join(rest)}")
    _print(result)
    machine.write(result, args.json)


if __name__ == "__main__":
    main()
