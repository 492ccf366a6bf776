"""What a recipe costs on a machine that is not at hand: which resource limits it, pairs a second, hours, and memory.

    python -m benchmarks.plan h100x8 a100x8 [MACHINE.yaml ...] --config engine/recipes/moco_v2_in1k.yaml
        [--loader LOADER.json] [--step STEP.json] [--images 1281167] [--json OUT] [any setting of a run]

A machine is a file of `benchmarks/machines/`, by its name, or one like it. Rates are measured ones: decoding from a
result of `benchmarks.loader` (default: the newest in `benchmarks/results/`), the step from a result of
`benchmarks.step` on a GPU of that kind; without one it is `SHARE` of the GPU's published rate, which is an assumption
and said to be one.

Of each global batch of B pairs on n GPUs of N nodes, g a node, seconds:

    compute    B / n * FLOPs a pair / (share * rate of a GPU), at least `LAUNCHES`
    decode     B / N / (pairs/s of a core * cores of a node * SCALING), or 0 where the decoded images stay on the GPU
    disk       B / N * bytes a record / disk, or 0 where the records stay in `CACHE` of a node's memory
    copy       B / n * bytes a pair to the GPU / host link
    gradients  2 (g - 1) / g * bytes / GPU link + 2 (N - 1) / N * bytes / network
    keys       (g - 1) / g * bytes / GPU link + (N - 1) / N * bytes / network, bytes B * dim * 4 for each view with keys
    crops      (g - 1) / g * B / n * bytes / GPU link + (N - 1) / N * B / N * bytes / network, bytes those of a pair's
               crops with keys, where BatchNorm shuffles
    norms      `LATENCY` for each collective of synchronized BatchNorm: one forward a layer and pass, one backward
    exchange   max(0, gradients + keys - compute * HIDES) + crops + norms: half of the computing hides the first two
    step       max(compute + exchange, decode, disk, copy)

Without a GPU, n processes of T loader threads each compute on the C cores that decode: with s and d CPU seconds a pair
of the step with its augmentation, and of decoding and cropping, and x = bytes / `GLOO` seconds a process and step of
exchange where n > 1, the step takes max(B / n * s + x, B / n * d / T, (B * (s + d) + n * x) / C) (`on_cores`, which
`benchmarks.scaling` sets against runs).

Pairs a second are B / step; hours are images * epochs / that. Memory a GPU is `engine.training.dry_run`'s estimate, in
the recipe's precision; where it is over `ROOM` of the GPU's, the batch is planned in the fewest parts that fit. The
fixed costs of start, evaluation and checkpoints are left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import machine
from benchmarks.step import OURS
from engine.config.cli import parse
from engine.config.settings import Settings
from engine.training.dry_run import estimate, memory_of
from engine.training.model import needed_views
from pipeline.backends.resident import SHARE as RESIDENT
from pipeline.system.errors import InputError, command
from pipeline.system.limits import RESULT_BYTES, read_json, read_yaml

SHARE = 0.195
"""Of a GPU's published bfloat16 rate that a ResNet-50 reaches in training: MLPerf 4.0's 7945 images/s on an H200
(0.197), NVIDIA's 2470 on an A100 (0.195), at 24.5 GFLOP an image. An assumption for other networks."""
LAUNCHES = 0.02
"""Seconds that the launches of a step's two thousand kernels take, at 10 microseconds each: an assumption."""
SCALING = 0.9
"""Of so many times one core's decoding that many cores reach."""
CACHE = 0.75
"""Of a node's memory that the page cache has."""
LATENCY = 20e-6, 60e-6
"""Seconds of a small collective that the GPUs wait for, in a node and between nodes: assumptions."""
HIDES = 0.5
"""Of the computing, that hides the exchange of gradients and keys: an assumption."""
ROOM = 0.92
"""Of a GPU's memory that a run may take."""
GLOO = 0.5e9
"""Bytes of gradients a second of a core that a process exchanges with another on its machine (2026-11-24, an EPYC)."""
_REMEDY = "give the JSON of a benchmark"
Found = TypeVar("Found")
_MOST = 1e9  # of anything a machine has
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Node:
    """A machine, as its file describes it; see `benchmarks/machines/h200x1.yaml` for the units."""

    name: str
    gpu: str
    gpus: int
    nodes: int
    cores: int
    memory_gib: float
    gpu_memory_gib: float
    gpu_tflops: float
    host_link_gbytes: float
    gpu_link_gbytes: float
    network_gbits: float
    disk_gbytes: float

    @property
    def world(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Rates:
    """What was measured, and where."""

    decode: float
    """Pairs a second and core, where a GPU crops."""
    record_bytes: float
    sent_bytes: float
    """To the GPU a pair."""
    flops: float
    """A second and GPU, of the step."""
    sources: tuple[str, str]
    """Of the decoding, and of the step."""


def load_machine(name: str) -> Node:
    """Return the machine of that name or file. Raises InputError."""
    path = _HERE / "machines" / f"{name}.yaml" if "/" not in name and not name.endswith(".yaml") else Path(name)
    known = ", ".join(sorted(file.stem for file in (_HERE / "machines").glob("*.yaml")))
    if not path.is_file():
        raise InputError(f"{name}: no such machine: choose of {known}, or give a file like theirs")
    remedy = "give " + ", ".join(field.name for field in fields(Node) if field.name != "name")
    try:
        node = Node(name=path.stem, **read_yaml(path, remedy))
    except TypeError as error:
        raise InputError(f"{path}: {error}: {remedy}") from None
    if not isinstance(node.gpu, str):
        raise InputError(f"{path}: gpu {node.gpu!r}: give its name")
    for field in fields(Node)[2:]:
        value, kinds = getattr(node, field.name), (int,) if field.type == "int" else (int, float)
        joins = field.name in ("gpu_link_gbytes", "network_gbits")  # 0 where there is nothing to join
        if type(value) not in kinds or not 0 <= value <= _MOST or not (value or joins):
            whole = ", a whole one" * (len(kinds) == 1)
            raise InputError(f"{path}: {field.name} {value!r}: give a number above 0{whole}")
    if (node.gpus > 1 and node.gpu_link_gbytes <= 0) or (node.nodes > 1 and node.network_gbits <= 0):
        raise InputError(f"{path}: gpu_link_gbytes or network_gbits is 0: give what joins its {node.world} GPUs")
    return node


def load_rates(node: Node, loader: Path | None, step: Path | None) -> Rates:
    """Return measured rates for a machine. Raises InputError where a file is not a result of these benchmarks."""
    loader = loader or max((_HERE / "results").glob("????-??-??-loader*.json"))
    decode, record, sent = _read(loader, _decoding)
    flops, source = SHARE * node.gpu_tflops * 1e12, f"assumed, {SHARE:.1%} of {node.gpu_tflops:g} TFLOP/s"
    if step is not None:
        gpu, best, rate = _read(step, _best_step)
        if node.gpu not in gpu:
            raise InputError(f"{step}: was measured on {gpu}, not on {node.gpu}: leave it out, or measure there")
        flops, source = 1e12 * rate, f"{step.name}, {best}, {gpu}"
    return Rates(decode, record, sent, flops, (loader.name, source))


def _decoding(found: dict[str, Any]) -> tuple[float, float, float]:
    """Return pairs a second and core, bytes a record, and bytes a pair to the GPU, of a result of the loader's."""
    first: dict[str, Any] = next((value for value in found.values() if isinstance(value, dict)), {})
    rows = (found.get("paths") or first.get("paths", {})).values()
    row = next((row for row in rows if row["name"] == "decode-only" and row["threads"] == 1), None)
    if row is None:
        raise InputError("has no decode-only with 1 thread: python -m benchmarks.loader --threads 1 --json F")
    sent = next((row["to_device_bytes"] for row in rows if row["name"] == "ffcv-gpu"), 0.0)
    return _positive(row["cpu"]["median"]), _positive(row["read_bytes"]), float(sent)


def _best_step(found: dict[str, Any]) -> tuple[str, str, float]:
    """Return the GPU, the fastest way and its TFLOP/s, of a result of the step's."""
    rates = {way: _positive(found["tflops"][way]["median"]) for way in OURS if way in found["tflops"]}
    best = max(rates, key=lambda way: rates[way])
    return str((found.get("machine") or {}).get("gpu") or "no GPU"), best, rates[best]


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no rate")
    return float(value)


def _read(path: Path, of: Callable[[dict[str, Any]], Found]) -> Found:
    """Return what `of` finds in a benchmark's JSON. Raises InputError where it is not there."""
    found = read_json(path, RESULT_BYTES, _REMEDY)
    try:
        return of(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not such a result ({error!r}): {_REMEDY}") from None


def plan(node: Node, rates: Rates, settings: Settings, run: dict[str, Any], images: int) -> dict[str, Any]:
    """Return what limits a run on a machine, and what it takes; `run` of `engine.training.dry_run.estimate`. See
    above."""
    batch, n = settings.data.batch, node.world
    if batch % n:
        raise InputError(
            f"{node.name}: data.batch {batch} does not divide among its {n} GPUs: choose a multiple of {n}"
        )
    resident = images * 3 * 256**2 <= RESIDENT * node.gpu_memory_gib * 2**30  # at 256 pixels a side
    cached = images * rates.record_bytes <= CACHE * node.memory_gib * 2**30
    parts = _parts(settings, run, node)
    exchanged = _exchanged(node, settings, run)
    sent = {
        "gradients": _sent(node, 2 * exchanged["gradients"], 2 * exchanged["gradients"]),
        "keys": _sent(node, exchanged["keys"], exchanged["keys"]),
        "crops": _sent(node, exchanged["crops"], exchanged["crops"] * n / node.nodes),
    }
    seconds = _seconds(node, rates, settings, run, sent, parts or 1, resident=resident, cached=cached)
    limits = {
        "GPU": seconds["compute"] + seconds["exchange"],
        **{name: seconds[name] for name in ("decode", "disk", "copy")},
    }
    limit = max(limits, key=lambda name: limits[name])
    rate = batch / limits[limit]
    hours = images * settings.optim.epochs / rate / 3600
    memory = memory_of(run, batch / n, parts or batch // n // 2 or 1) / 2**30
    wanted = batch / limits["GPU"] / node.nodes / node.gpus  # pairs/s of a GPU that waits for nothing
    return {
        "machine": node.name,
        "gpus": n,
        "seconds": seconds,
        "limit": limit,
        "parts": parts,
        "pairs_per_second": rate if parts else float("nan"),
        "hours": hours if parts else float("nan"),
        "gpu_hours": hours * n if parts else float("nan"),
        "backend": "resident" if resident else "ffcv_gpu",
        "cores_a_gpu": 0.0 if resident else wanted / (rates.decode * SCALING),
        "memory_gib": memory,
        "memory_by_batch_gib": {size: memory_of(run, size) / 2**30 for size in (32, 64, 128, 256, 512, 1024)},
        "page_cache_gib": images * rates.record_bytes / 2**30,
        "cached": cached,
        "busy": {
            "GPU link": sum(within for within, _ in sent.values()) / limits[limit],
            "network": sum(across for _, across in sent.values()) / limits[limit],
        },
        "exchanged_bytes_a_step": exchanged,
        "first": _advice(limit, seconds, node, wanted / (rates.decode * SCALING), memory, parts),
    }


def _exchanged(node: Node, settings: Settings, run: dict[str, Any]) -> dict[str, float]:
    """Return the bytes that a GPU exchanges in a step: gradients, all keys, and its share of the shuffled crops."""
    assert settings.model.dim is not None
    batch, n = settings.data.batch, node.world
    queries, keys = len(needed_views(settings, "qQ")), len(needed_views(settings, "kK"))
    gathers = n > 1 and settings.method.name != "byol"
    shuffles = n > 1 and settings.model.bn == "shuffle"
    return {
        "gradients": run["trained"] * (2 if settings.gradient_dtype == "bfloat16" else 4),
        "keys": 4 * batch * settings.model.dim * (keys or queries) if gathers else 0,
        "crops": 3 * settings.data.size**2 * keys * batch / n if shuffles else 0.0,
    }


def _seconds(
    node: Node,
    rates: Rates,
    settings: Settings,
    run: dict[str, Any],
    sent: dict[str, tuple[float, float]],
    parts: int,
    *,
    resident: bool,
    cached: bool,
) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on; `exchange`: those that computing does not hide."""
    batch, n, nodes = settings.data.batch, node.world, node.nodes
    without, with_gradient = run["norm_passes"] if settings.model.bn == "sync" and n > 1 else (0, 0)
    seconds = {
        "compute": max(LAUNCHES * parts, batch / n * run["flops_a_pair"] / rates.flops),
        "decode": 0.0 if resident else batch / nodes / (rates.decode * node.cores * SCALING),
        "disk": 0.0 if cached or resident else batch / nodes * rates.record_bytes / (node.disk_gbytes * 1e9),
        "copy": 0.0 if resident else batch / n * rates.sent_bytes / (node.host_link_gbytes * 1e9),
        **{name: sum(busy) for name, busy in sent.items()},
        "norms": (without + 2 * with_gradient) * LATENCY[nodes > 1] * parts,
    }
    shown = max(0.0, seconds["gradients"] + seconds["keys"] - seconds["compute"] * HIDES)
    return seconds | {"exchange": shown + seconds["crops"] + seconds["norms"]}


def on_cores(
    step: float, crops: float, gradients: int, batch: int, processes: int, threads: int, cores: int
) -> tuple[float, str]:
    """Return the pairs a second of training without a GPU, and what limits them.

    step, crops: CPU seconds a pair. gradients: their bytes. Each process computes on one core, and crops in so many
    threads. What threads that wait for a core cost is left out: three to a core ran a fifth slower than this says.
    """
    exchange = gradients / GLOO if processes > 1 else 0.0
    seconds = {
        "step": batch / processes * step + exchange,
        "loader threads": batch / processes * crops / threads,
        "cores": (batch * (step + crops) + processes * exchange) / cores,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return batch / seconds[limit], limit


def _sent(node: Node, bytes_of_gpu: float, bytes_of_node: float) -> tuple[float, float]:
    """Return the seconds of the GPUs' link to gather those bytes on each GPU of a node, and of the network, on each."""
    within = (node.gpus - 1) / node.gpus * bytes_of_gpu / (node.gpu_link_gbytes * 1e9) if node.gpus > 1 else 0.0
    across = (node.nodes - 1) / node.nodes * bytes_of_node / (node.network_gbits / 8 * 1e9) if node.nodes > 1 else 0.0
    return within, across


def _parts(settings: Settings, run: dict[str, Any], node: Node) -> int:
    """Return the fewest equal parts, of those asked for or more, in which a GPU's share of a batch fits; 0: none."""
    own, room = settings.data.batch // node.world, ROOM * node.gpu_memory_gib * 2**30
    wanted = [parts for parts in range(settings.parts(node.world), own // 2 + 1) if own % parts == 0]
    return next((parts for parts in wanted if memory_of(run, own, parts) <= room), 0)


def _advice(limit: str, seconds: dict[str, float], node: Node, cores: float, memory: float, parts: int) -> str:
    if not parts:
        return (
            f"memory: {memory:.0f} GiB of {node.gpu_memory_gib:g} needed: activation_checkpointing true, or more GPUs"
        )
    if seconds["norms"] > 0.1 * seconds["compute"]:
        return "BatchNorm's collectives, one for each layer and pass: a larger batch a GPU, or another model.bn"
    if limit == "GPU" and seconds["compute"] == LAUNCHES:
        return "the batch, too small for so many GPUs: launches take longer than computing: a larger one, or cuda_graph"
    if limit == "decode":
        return (
            f"decoding: {cores:.0f} cores a GPU would keep up; else data.backend dali, prepare --encode-all (half the "
            "work a record), or smaller records"
        )
    if limit == "disk":
        return "the disk: stage the beton on local NVMe (python -m pipeline.stage), or prepare --max-side 400"
    if limit == "copy":
        return "the link to the GPU: data.backend ffcv or dali"
    if seconds["exchange"] > 0.1 * seconds["compute"]:
        return "the exchange: gradient_dtype bfloat16, a larger batch, or model.bn plain in place of shuffle"
    return "the GPU: compile true, cuda_graph true; data.sizes [160, 192, 224] takes about 0.8 of the time"


def report(settings: Settings, plans: list[dict[str, Any]]) -> machine.Report:
    """Return the table of plans."""
    title = f"{settings.objective}, {settings.model.arch}, batch {settings.data.batch}, {settings.optim.epochs} epochs"
    headings = ["", "limit", "pairs/s", "hours", "GPU-hours", "cores a GPU", "GiB a GPU", "page cache GiB"]
    headings += ["MB a step: gradients, keys, crops", "exchange, ms a step", "of it not hidden", "GPU link busy"]
    headings += ["network busy"]
    rows = [
        [
            found["machine"],
            found["limit"],
            f"{found['pairs_per_second']:,.0f}",
            f"{found['hours']:,.1f}",
            f"{found['gpu_hours']:,.0f}",
            f"{found['cores_a_gpu']:.1f}",
            f"{found['memory_gib']:.1f}",
            f"{found['page_cache_gib']:.0f}",
            ", ".join(f"{size / 1e6:.1f}" for size in found["exchanged_bytes_a_step"].values()),
            f"{1e3 * sum(found['seconds'][name] for name in ('gradients', 'keys', 'crops', 'norms')):.2f}",
            f"{1e3 * found['seconds']['exchange']:.2f}",
            *(f"{share:.1%}" for share in found["busy"].values()),
        ]
        for found in plans
    ]
    notes = [line for found in plans for line in _notes(settings, found)]
    return machine.Report(title, headings, rows, [title, *notes, f"decoding: {plans[0]['sources'][0]}", *assumptions()])


def assumptions() -> list[str]:
    """Return the constants that enter each plan, in words."""
    within, between = (1e6 * seconds for seconds in LATENCY)
    return [
        f"assumed: {SHARE:.1%} of a GPU's published rate, where its step was not measured (SHARE)",
        f"assumed: a step's launches take {1e3 * LAUNCHES:g} ms at least, of each part computed at once (LAUNCHES)",
        f"assumed: cores decode {SCALING:g} times as fast as one core, times their number (SCALING)",
        f"assumed: records up to {CACHE:g} of a node's memory are read from disk once (CACHE)",
        f"assumed: decoded images up to {RESIDENT:g} of a GPU's memory stay there (RESIDENT)",
        f"assumed: half of the computing ({HIDES:g}) hides the exchange of gradients and keys (HIDES), which link and "
        "network make at their full published rates",
        f"assumed: {within:g} us a collective of synchronized BatchNorm within a node, {between:g} us between nodes "
        "(LATENCY)",
        f"assumed: a run may take {ROOM:g} of a GPU's memory (ROOM)",
    ]


def _notes(settings: Settings, found: dict[str, Any]) -> list[str]:
    """Return what the table has no room for."""
    name, own = found["machine"], settings.data.batch // found["gpus"]
    sizes = ", ".join(f"{size}: {gib:.0f}" for size, gib in found["memory_by_batch_gib"].items())
    lines = [
        f"{name}: first {found['first']}",
        f"{name}: data.backend {found['backend']}; step: {found['sources'][1]}",
        f"{name}: GiB a GPU by pairs computed at once: {sizes}",
    ]
    if found["parts"] > settings.parts(found["gpus"]):
        lines.insert(
            0, f"{name}: {own} pairs a GPU do not fit at once: planned with micro_batch {own // found['parts']}"
        )
    return lines


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="Plan a run on another machine.")
    parser.add_argument("machines", nargs="+", metavar="MACHINE", help="name or file of a machine")
    parser.add_argument("--loader", type=Path, help="JSON of benchmarks.loader (default: the newest in results/)")
    parser.add_argument("--step", type=Path, help="JSON of benchmarks.step on a GPU of that kind")
    parser.add_argument("--images", type=int, default=1_281_167, help="default %(default)s, ImageNet")
    machine.add_outputs(parser)
    args, rest = parser.parse_known_args()
    if args.images < 1:
        raise InputError(f"--images {args.images}: give 1 or more")
    settings = parse(rest)
    nodes = [load_machine(name) for name in args.machines]
    precision = "bf16" if settings.precision == "fp16" else settings.precision  # which the CPU has not: as large
    run = estimate(replace(settings, cpu=True, precision=precision, data=replace(settings.data, samples=args.images)))
    plans = []
    for node in nodes:
        rates = load_rates(node, args.loader, args.step)
        plans.append(plan(node, rates, settings, run, args.images))
        plans[-1]["sources"] = rates.sources
    result = {"machine": machine.describe(), "arguments": rest, "plans": plans}
    machine.tell(report(settings, plans), result, args)


if __name__ == "__main__":
    main()
