"""Training steps a second: ours, eager, compiled and as a CUDA graph, and other implementations of MoCo.

    python -m benchmarks.step [--compare eager,compiled,graph,official,...] [--runs 10] [--no-parts]
        [--cudnn-benchmark on|off] [--json OUT] [--markdown OUT]
        --config engine/recipes/moco_v2_in1k.yaml [--data.batch 64] [any setting of a run]

The implementations take steps in turn on the same batch, which lies on the device; between them each part of our step
runs alone: encoders, loss with its terms, guard, moving average, optimizer, queue, and the augmentation of both views.
Reported are medians and spread of wall clock, and of CPU time without a GPU; ratios and shares are taken run by run.

- `eager-graph`, `graph`: eager or compiled, and replayed as one CUDA graph.
- `official`: facebookresearch/moco's training loop in float32 and NCHW as published, without its shuffling.
- `lightly`: lightly's MoCo, if installed.
- `official-amp`, `lightly-amp`: the same under autocast, in the run's precision, else bf16.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, require_positive
from benchmarks.common.peers import PEERS
from benchmarks.common.table import Report, publish, spread, spread_cell
from engine.config.cli import parse
from engine.config.settings import Settings
from engine.parallel.accelerator import DTYPES, build_accelerator, warn_of_precision
from engine.training.cuda_graph import WARM, Graph
from engine.training.model import Model, build_model
from methods.base import Embeddings, total
from pipeline.augment.color import augment
from pipeline.augment.draws import draw_color
from pipeline.loader import Batch
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command
from pipeline.system.packages import installed

Call = Callable[[], Any]
OURS = ("eager", "eager-graph", "compiled", "graph")
ENCODERS = ("encoder, queries", "encoder, keys")
COMPARED = (*OURS, *(f"{peer}{amp}" for peer in PEERS for amp in ("", "-amp")))


def batch_of(settings: Settings, device: torch.device) -> Batch:
    """Return random views as the loader yields them, in the encoder's precision."""
    dtype = DTYPES[settings.precision]
    side, count = settings.data.size, settings.data.batch
    generator = torch.Generator().manual_seed(0)
    views = tuple(
        torch.randn(count, 3, side, side, generator=generator).to(device, dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    return Batch(views, np.arange(count), 0, 0, 0.0)


def build_steps(settings: Settings, compared: list[str], accelerator: Accelerator) -> tuple[dict[str, Call], Model]:
    """Return the steps to compare, by name, and our eager model."""
    device, batch = accelerator.device, batch_of(settings, accelerator.device)
    pair = tuple(view.float().contiguous() for view in batch.views if view is not None)
    ours = build_model(replace(settings, compile=False, cuda_graph=False), accelerator)
    half = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    steps: dict[str, Call] = {}
    for name in compared:
        if name == "eager":
            steps[name] = partial(ours.step, batch)
        elif name in OURS:
            chosen = replace(settings, compile=name != "eager-graph", cuda_graph="graph" in name)
            model = build_model(chosen, accelerator)
            steps[name] = partial(model.step, batch)
        else:
            peer, _, amp = name.partition("-")
            other: Any = PEERS[peer](ours.step.encoder, settings, device, half if amp else None)
            steps[name] = partial(other.step, pair)
    return steps, ours


def build_parts(settings: Settings, model: Model, accelerator: Accelerator) -> dict[str, Call]:
    """Return the parts of our step, by name."""
    device, batch = accelerator.device, batch_of(settings, accelerator.device)
    moving_average = model.step.moving_average
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
        for number, view in enumerate(settings.data.augmentations)
    ]
    parts: dict[str, Call] = {ENCODERS[0]: encode_queries}
    if model.target is not None and moving_average is not None:
        parts[ENCODERS[1]] = encode_keys
        parts["moving average"] = lambda: moving_average.update(model.step.schedule.ema_weight)
    if model.queue is not None:
        new_keys = named.get("k2", next(iter(named.values())))
        parts["queue"] = lambda: model.queue.write(new_keys)  # type: ignore[union-attr]
    parts |= {
        "loss and terms": loss,
        "guard": guard,
        "optimizer": model.optimizer.optimizer.step,
        "augmentation": lambda: [
            augment(crops, color, settings.data.statistics, DTYPES[settings.precision]) for color in colors
        ],
    }
    return parts


def clock(call: Call, device: torch.device) -> dict[str, float]:
    """Return a call's seconds of wall clock and of CPU time; on a GPU also the bytes it allocates at most."""
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
"""Seconds or bytes of each run, by call and kind (wall, cpu, bytes)."""


def in_turn(calls: dict[str, Call], device: torch.device, runs: int, warmup: int = WARM + 2) -> Taken:
    """Call each in turn, `runs` times after the warm-up; return what each took. Bytes are the most of all runs."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(warmup + runs):
        for name, call in calls.items():
            samples[name].append(clock(call, device))
    taken = {}
    for name, rows in samples.items():
        kinds = {kind: np.array([row[kind] for row in rows]) for kind in rows[0]}
        # a graph allocates its memory once, when it is recorded
        taken[name] = {kind: np.full(runs, v.max()) if kind == "bytes" else v[warmup:] for kind, v in kinds.items()}
    return taken


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    taken = in_turn({"product": lambda: torch.mm(a, b)}, device, 5)["product"]["wall"]
    return float(2 * side**3 / np.median(taken) / 1e12)


def as_graphs(calls: dict[str, Call], model: Model, device: torch.device) -> dict[str, Call]:
    """Return the calls as CUDA graphs, as which they run within a graphed step."""
    gradients: list[Any] = []  # kept alive: the graphs read them

    def graph(call: Call) -> Call:
        def recorded(_: Any) -> Any:
            gradients.append([p.grad for p in model.step.encoder.parameters()])
            return call()

        replay = Graph[Any](recorded, device)
        return lambda: replay({})

    return {name: graph(call) for name, call in calls.items()}


def flops_a_step(settings: Settings, ours: Model, accelerator: Accelerator) -> int:
    """Return the operations of a step, without the repetitions of `activation_checkpointing`."""
    model = ours
    if settings.activation_checkpointing:
        plain = replace(settings, activation_checkpointing=False, compile=False, cuda_graph=False)
        model = build_model(plain, accelerator)
    with FlopCounterMode(display=False) as counter:
        model.step(batch_of(settings, accelerator.device))
    return counter.get_total_flops()


def measure(
    settings: Settings, compared: list[str], runs: int, *, parts_too: bool = True, cudnn_benchmark: bool | None = None
) -> dict[str, Any]:
    """Time each implementation's step and each part of ours; return seconds, rates, ratios and shares.

    cudnn_benchmark: whether cuDNN measures its algorithms before it chooses one; None: torch's or the engine's choice.
    """
    accelerator = build_accelerator(replace(settings, tracker="none"))
    warn_of_precision(settings.precision, accelerator)
    settings, device = replace(settings, precision=accelerator.mixed_precision), accelerator.device
    if cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = cudnn_benchmark
    steps, ours = build_steps(settings, compared, accelerator)
    flops = flops_a_step(settings, ours, accelerator)
    parts = build_parts(settings, ours, accelerator) if parts_too else {}
    others = [name for name in parts if name not in ENCODERS]
    graphs: dict[str, Call] = {}
    if {"graph", "eager-graph"} & steps.keys() and device.type == "cuda":
        graphed = as_graphs({name: parts[name] for name in others}, ours, device)
        graphs = {f"{name}, graph": call for name, call in graphed.items()}
    taken = in_turn({**steps, **parts, **graphs}, device, runs)
    kind, batch = "wall" if device.type == "cuda" else "cpu", settings.data.batch
    shares = {}
    for name in (name for name in steps if name in OURS and parts):
        suffix = ", graph" if "graph" in name and graphs else ""
        overhead = sum(taken[f"{part}{suffix}"][kind] for part in others)
        augmentation = taken[f"augmentation{suffix}"][kind]  # by the loader, on top of the step's own time
        shares[name] = spread(overhead / (taken[name][kind] + augmentation))

    def ratios(reference: str, names: Iterable[str]) -> dict[str, dict[str, float]]:
        return {name: spread(taken[reference][kind] / taken[name][kind]) for name in names if reference in steps}

    return {
        "device": device.type,
        "clock": kind,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "runs": runs,
        "ways": {name: _spreads(taken[name]) for name in steps},
        "parts": {name: _spreads(taken[name]) for name in (*parts, *graphs)},
        "pairs_per_second": {name: spread(batch / taken[name]["wall"]) for name in steps},
        "ratio_to_official": ratios("official", steps),
        "ratio_to_eager": ratios("eager", [name for name in steps if name in OURS]),
        "share_outside_encoders": shares,
        "flops_a_step": flops,
        "trained_parameters": sum(p.numel() for p in ours.step.encoder.parameters() if p.requires_grad),
        "tflops": {name: spread(flops / taken[name]["wall"] / 1e12) for name in steps},
        "matrix_tflops": matrix_rate(device, DTYPES[settings.precision]),
    }


def _spreads(taken: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {kind: spread(values) for kind, values in taken.items()}


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows = []
    for name, taken in (*result["ways"].items(), *result["parts"].items()):
        row = [name if name in result["ways"] else f"part: {name}"]
        row += [spread_cell(taken[kind], "{:.1f}", 1000) for kind in ("wall", "cpu")]
        if name in result["ways"]:
            row += [spread_cell(result["pairs_per_second"][name], "{:.1f}")]
            tflops = result["tflops"][name]["median"]
            row += [f"{tflops:.2f}", f"{tflops / result['matrix_tflops']:.0%}"]
            row += [f"{taken['bytes']['median'] / 2**30:.2f}" if "bytes" in taken else ""]
            ratio = result["ratio_to_official"].get(name)
            row += [spread_cell(ratio, "{:.2f}") if ratio else ""]
        rows.append(row + [""] * (8 - len(row)))
    clock = {"wall": "wall clock", "cpu": "CPU time"}[result["clock"]]
    notes = [
        f"{result['runs']} runs: median (least-most); ratios and shares by {clock}; a matrix product runs at "
        f"{result['matrix_tflops']:.2f} TFLOP/s, a step has {result['flops_a_step'] / 1e9:.1f} GFLOP"
    ]
    if result["device"] == "cuda":
        notes.append(f"torch.backends.cudnn.benchmark {'on' if result['cudnn_benchmark'] else 'off'}")
    notes += [
        f"all but the encoders, {name}: {spread_cell(share, '{:.1%}')}"
        for name, share in result["share_outside_encoders"].items()
    ]
    notes += [
        f"{name} to eager: {spread_cell(ratio, '{:.2f}')}"
        for name, ratio in result["ratio_to_eager"].items()
        if name != "eager"
    ]
    headings = ["", "ms", "CPU ms", "pairs/s", "TFLOP/s", "of a matrix's", "GiB", "to official"]
    return Report("Training step", headings, rows, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    renamed = {"--ways": "--compare", "--threads": "--torch-threads"}
    parser = benchmark_parser("step", "Time training steps.", renamed)
    default = "eager,compiled,official,official-amp"
    parser.add_argument("--compare", default=default, help=f"some of {', '.join(COMPARED)} (default %(default)s)")
    parser.add_argument("--runs", type=int, default=10, help="steps timed of each (default %(default)s)")
    parser.add_argument("--no-parts", action="store_true", help="time the steps alone")
    parser.add_argument("--cudnn-benchmark", choices=["on", "off"], help="measure cuDNN's algorithms first, or not")
    parser.add_argument("--torch-threads", type=int, default=available_cores(), help="(default: all cores)")
    return parser


@command
def main() -> None:
    args, rest = parser().parse_known_args()
    compared = args.compare.split(",")
    for name in compared:
        if name not in COMPARED:
            raise InputError(f"--compare {name}: choose one of {', '.join(COMPARED)}")
        if name.startswith("lightly") and not installed("lightly"):
            raise InputError(f"--compare {name}: lightly is not installed: pip install lightly, or leave it out")
    require_positive(args, "runs", "torch_threads")
    settings = parse(rest)
    if settings.method.name != "moco_v2" and not set(compared) <= set(OURS):
        raise InputError(
            f"--compare {args.compare}: the other loops are MoCo v2's: leave them out for {settings.method.name}"
        )
    torch.set_num_threads(args.torch_threads)
    tuned = None if args.cudnn_benchmark is None else args.cudnn_benchmark == "on"
    about = machine.describe()
    taken = measure(settings, compared, args.runs, parts_too=not args.no_parts, cudnn_benchmark=tuned)
    publish(report, args, machine=about, arguments=rest, **taken)


if __name__ == "__main__":
    main()
