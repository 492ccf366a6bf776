"""Training steps a second: ours, eager, compiled and as a CUDA graph, and other implementations of MoCo.

    python -m benchmarks.step [--ways eager,compiled,graph,official,...] [--runs 10] [--json OUT] [--markdown OUT]
        --config engine/recipes/moco_v2_in1k.yaml [--data.batch 64] [any setting of a run]

The ways take steps in turn on the same batch, which lies on the device, and between them runs each part of our step
alone: encoders, loss with its terms, guard, moving average, optimizer, queue, and the augmentation of both views. Told
are medians and spread of wall clock, and of CPU time where there is no GPU; ratios and shares are taken run by run.
`graph` is compiled, and replayed as one CUDA graph. `official` is facebookresearch/moco's training loop, in float32 and
NCHW as published, without its shuffling; `lightly` lightly's MoCo, where it is installed; `official-amp` and
`lightly-amp` the same under autocast, in the precision of the run, else bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import machine
from benchmarks.common.peers import PEERS
from engine.config.cli import parse
from engine.config.settings import Settings
from engine.parallel.accelerator import DTYPES, build_accelerator, warn_of_precision
from engine.training.cuda_graph import WARM, Graph
from engine.training.model import Model, build_model
from methods.base import Embeddings, total
from pipeline.augment.color import IMAGENET, augment
from pipeline.augment.draws import draw_color
from pipeline.loader import Batch
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command
from pipeline.system.packages import installed
from pipeline.views import AUGMENTATIONS

Call = Callable[[], Any]
OURS = ("eager", "compiled", "graph")
ENCODERS = ("encoder, queries", "encoder, keys")
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
    ours = build_model(replace(settings, compile=False, cuda_graph=False), accelerator)
    half = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    found: dict[str, Call] = {}
    for name in chosen:
        if name == "eager":
            found[name] = lambda: ours.step(batch)
        elif name in OURS:
            model = build_model(replace(settings, compile=True, cuda_graph=name == "graph"), accelerator)
            found[name] = lambda model=model: model.step(batch)  # type: ignore[misc]
        else:
            peer, _, amp = name.partition("-")
            theirs = PEERS[peer](ours.step.encoder, settings, device, half if amp else None)
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
        model.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            torch.stack([q.float().sum() for q in model.online(*queries)]).sum().backward()

    def loss() -> None:
        leaves = {name: value.detach().requires_grad_(name[0] in "qQ") for name, value in named.items()}
        queue = None if model.queue is None else model.queue.keys
        total(model.step.objective(Embeddings(leaves, queue, 0))).backward()

    online, buffers = model.step.encoder, model.step.buffers

    def guard() -> None:
        before = buffers.snapshot()
        norm = get_total_norm([p.grad for p in online.parameters() if p.grad is not None])
        buffers.restore_unless(norm.isfinite(), before)

    crops = torch.randint(0, 256, (count, settings.data.size, settings.data.size, 3), dtype=torch.uint8, device=device)
    colors = [
        draw_color(view, number, seed=0, epoch=0, ids=np.arange(count))
        for number, view in enumerate(AUGMENTATIONS[settings.data.augmentation])
    ]
    found: dict[str, Call] = {ENCODERS[0]: encode_queries}
    if model.target is not None and moving is not None:
        found |= {ENCODERS[1]: encode_keys, "moving average": lambda: moving.update(model.step.schedule.share)}
    if model.queue is not None:
        fresh = named.get("k2", next(iter(named.values())))
        found["queue"] = lambda: model.queue.write(fresh)  # type: ignore[union-attr]
    found |= {
        "loss and terms": loss,
        "guard": guard,
        "optimizer": model.optimizer.optimizer.step,
        "augmentation": lambda: [augment(crops, color, IMAGENET, DTYPES[settings.precision]) for color in colors],
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


Taken = dict[str, dict[str, np.ndarray]]
"""Seconds or bytes of each run, by kind of each call."""


def in_turn(calls: dict[str, Call], device: torch.device, runs: int, warm: int = WARM + 2) -> Taken:
    """Return what each took, called one after another, `runs` times after the warm-up; bytes are the most of any."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(warm + runs):
        for name, call in calls.items():
            found[name].append(clock(call, device))
    taken = {name: {kind: np.array([run[kind] for run in all_]) for kind in all_[0]} for name, all_ in found.items()}
    return {
        # a graph takes its memory once, when it is recorded
        name: {kind: np.full(runs, v.max()) if kind == "bytes" else v[warm:] for kind, v in kinds.items()}
        for name, kinds in taken.items()
    }


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    taken = in_turn({"product": lambda: torch.mm(a, b)}, device, 5)["product"]["wall"]
    return float(2 * side**3 / np.median(taken) / 1e12)


def as_graphs(calls: dict[str, Call], model: Model, device: torch.device) -> dict[str, Call]:
    """Return calls that run as CUDA graphs, as they do within a step that is one."""
    held: list[Any] = []

    def graph(call: Call) -> Call:
        def recorded(_: Any) -> Any:
            held.append([p.grad for p in model.step.encoder.parameters()])  # which the graph goes on reading
            return call()

        made = Graph[Any](recorded, device)
        return lambda: made({})

    return {name: graph(call) for name, call in calls.items()}


def flops_a_step(settings: Settings, ours: Model, accelerator: Accelerator) -> int:
    """Return the operations of a step; what `activation_checkpointing` does once more is not counted."""
    plain = (
        settings
        if not settings.activation_checkpointing
        else replace(settings, activation_checkpointing=False, compile=False, cuda_graph=False)
    )
    model = ours if plain is settings else build_model(plain, accelerator)
    with FlopCounterMode(display=False) as counter:
        model.step(batch_of(settings, accelerator.device))
    return counter.get_total_flops()


def measure(settings: Settings, chosen: list[str], runs: int) -> dict[str, Any]:
    """Return seconds of each way's step, of each part of ours, and what follows from them."""
    accelerator = build_accelerator(replace(settings, tracker="none"))
    warn_of_precision(settings.precision, accelerator)
    settings, device = replace(settings, precision=accelerator.mixed_precision), accelerator.device
    steps, ours = ways(settings, chosen, accelerator)
    flops = flops_a_step(settings, ours, accelerator)
    alone = parts(settings, ours, accelerator)
    beside = [name for name in alone if name not in ENCODERS]
    graphs: dict[str, Call] = {}
    if "graph" in steps and device.type == "cuda":
        graphs = {
            f"{name}, graph": call for name, call in as_graphs({n: alone[n] for n in beside}, ours, device).items()
        }
    taken = in_turn({**steps, **alone, **graphs}, device, runs)
    rate = matrix_rate(device, DTYPES[settings.precision])
    kind, batch = "wall" if device.type == "cuda" else "cpu", settings.data.batch
    shares = {}
    for name in (name for name in steps if name in OURS):
        suffix = ", graph" if name == "graph" and graphs else ""
        others = sum(taken[f"{part}{suffix}"][kind] for part in beside)
        augmentation = taken[f"augmentation{suffix}"][kind]  # which the loader does, beside the step's own time
        shares[name] = others / (taken[name][kind] + augmentation)
    official = taken.get("official")
    return {
        "device": device.type,
        "clock": kind,
        "runs": runs,
        "ways": {name: _spreads(taken[name]) for name in steps},
        "parts": {name: _spreads(taken[name]) for name in (*alone, *graphs)},
        "pairs_per_second": {name: machine.spread(batch / taken[name]["wall"]) for name in steps},
        "ratio_to_official": {
            name: machine.spread(official[kind] / taken[name][kind]) for name in steps if official is not None
        },
        "ratio_to_eager": {
            name: machine.spread(taken["eager"][kind] / taken[name][kind])
            for name in steps
            if name in OURS and "eager" in steps
        },
        "share_beside_the_encoders": {name: machine.spread(share) for name, share in shares.items()},
        "flops_a_step": flops,
        "trained_parameters": sum(p.numel() for p in ours.step.encoder.parameters() if p.requires_grad),
        "tflops": {name: machine.spread(flops / taken[name]["wall"] / 1e12) for name in steps},
        "matrix_tflops": rate,
    }


def _spreads(taken: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {kind: machine.spread(values) for kind, values in taken.items()}


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table of a result."""
    rows = []
    for name, taken in (*result["ways"].items(), *result["parts"].items()):
        row = [name if name in result["ways"] else f"part: {name}"]
        row += [machine.told(taken[kind], "{:.1f}", 1000) for kind in ("wall", "cpu")]
        if name in result["ways"]:
            row += [machine.told(result["pairs_per_second"][name], "{:.1f}")]
            tflops = result["tflops"][name]["median"]
            row += [f"{tflops:.2f}", f"{tflops / result['matrix_tflops']:.0%}"]
            row += [f"{taken['bytes']['median'] / 2**30:.2f}" if "bytes" in taken else ""]
            ratio = result["ratio_to_official"].get(name)
            row += [machine.told(ratio, "{:.2f}") if ratio else ""]
        rows.append(row + [""] * (8 - len(row)))
    clock = {"wall": "wall clock", "cpu": "CPU time"}[result["clock"]]
    notes = [
        f"{result['runs']} runs: median (least-most); ratios and shares by {clock}; a matrix product runs at "
        f"{result['matrix_tflops']:.2f} TFLOP/s, a step has {result['flops_a_step'] / 1e9:.1f} GFLOP"
    ]
    notes += [
        f"all but the encoders, {name}: {machine.told(share, '{:.1%}')}"
        for name, share in result["share_beside_the_encoders"].items()
    ]
    notes += [
        f"{name} to eager: {machine.told(ratio, '{:.2f}')}"
        for name, ratio in result["ratio_to_eager"].items()
        if name != "eager"
    ]
    headings = ["", "ms", "CPU ms", "pairs/s", "TFLOP/s", "of a matrix's", "GiB", "to official"]
    return machine.Report("Training step", headings, rows, notes)


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time training steps.")
    parser.add_argument(
        "--ways", default="eager,compiled,official,official-amp", help=f"of {', '.join(WAYS)} (default %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=10, help="steps timed of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU (default: all cores)")
    machine.add_outputs(parser)
    args, rest = parser.parse_known_args()
    chosen = args.ways.split(",")
    for name in chosen:
        if name not in WAYS:
            raise InputError(f"--ways {name}: choose of {', '.join(WAYS)}")
        if name.startswith("lightly") and not installed("lightly"):
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
    machine.tell(report(result), result, args)


if __name__ == "__main__":
    main()
