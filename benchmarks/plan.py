"""Plan of a run on another machine: limiting resource, pairs a second, hours, memory.

    python -m benchmarks.plan h100x8 a100x8 [MACHINE.yaml ...] --config engine/recipes/moco_v2_in1k.yaml
        [--loader LOADER.json] [--step STEP.json] [--images 1281167] [--json OUT] [any setting of a run]

A machine is a file of `benchmarks/machines/`, given by name, or a file like them. Rates are measured: decoding by
`benchmarks.loader` (default: the newest result in `benchmarks/results/`), the step by `benchmarks.step` on a GPU of
that kind. Without the latter the plan assumes `COMPUTE_SHARE` of the GPU's published rate, and says so.

A step takes as long as the slowest of: computing plus the exchange that it does not hide, decoding, disk, copy to the
GPU. `step_seconds` has the formulas. Without a GPU the processes compute on the cores that decode: `on_cores`, which
`benchmarks.scaling` compares with runs.

Memory a GPU is the estimate of `engine.training.dry_run`
in the recipe's precision; above `MEMORY_SHARE` of the GPU's, the batch is planned in the fewest parts that fit. Fixed
costs of start, evaluation and checkpoints are left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, require_positive, yaml_file
from benchmarks.common.table import Report, publish
from benchmarks.step import OURS
from engine.config.cli import parse
from engine.config.settings import Settings
from engine.training.dry_run import estimate, memory_of
from engine.training.model import needed_views
from pipeline.backends.resident import SHARE as RESIDENT_SHARE
from pipeline.system.errors import InputError, command
from pipeline.system.limits import RESULT_BYTES, read_json, read_yaml

COMPUTE_SHARE = 0.195
"""Fraction of the GPU's published rate that training reaches: MLPerf 4.0's 7945 images/s of ResNet-50 on an H200
(0.197), NVIDIA's 2470 on an A100 (0.195), at 24.5 GFLOP an image. An assumption for other networks."""
LAUNCH_SECONDS = 0.01
"""A thousand kernels at 10 microseconds each."""
CORE_SCALING = 0.9
CACHE_SHARE = 0.75
COLLECTIVE_SECONDS = 20e-6, 60e-6
OVERLAP_SHARE = 0.5
MEMORY_SHARE = 0.92
GLOO_BYTES_PER_SECOND = 0.5e9
"""Gradients exchanged by a process with another on its machine, per core (2026-11-24, an EPYC)."""
_MAX_QUANTITY = 1e9  # largest number of anything in a machine
_REMEDY = "give the JSON of a benchmark"
_HERE = Path(__file__).parent
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A machine as described by its file; units: see `benchmarks/machines/h200x1.yaml`."""

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
    """Measured rates, and their sources."""

    decode: float
    """Pairs per second and core, where a GPU crops."""
    record_bytes: float
    sent_bytes: float
    """Bytes a pair to the GPU."""
    flops: float
    """Operations of the step per second and GPU."""
    sources: tuple[str, str]
    """Sources of the decoding rate, and of the step's."""


def load_machine(name: str) -> Node:
    """Return the machine of a name or file. Raises InputError."""
    path = yaml_file(name, _HERE / "machines", "machine")
    remedy = "give " + ", ".join(field.name for field in fields(Node) if field.name != "name")
    try:
        node = Node(name=path.stem, **read_yaml(path, remedy))
    except TypeError as error:
        raise InputError(f"{path}: {error}: {remedy}") from None
    if not isinstance(node.gpu, str):
        raise InputError(f"{path}: gpu {node.gpu!r}: give its name")
    for field in fields(Node)[2:]:
        value, kinds = getattr(node, field.name), (int,) if field.type is int else (int, float)
        may_be_0 = field.name in ("gpu_link_gbytes", "network_gbits")  # a single GPU or node has none
        if type(value) not in kinds or not 0 <= value <= _MAX_QUANTITY or not (value or may_be_0):
            kind = "an integer" if kinds == (int,) else "a number"
            raise InputError(f"{path}: {field.name} {value!r}: give {kind} above 0")
    if (node.gpus > 1 and node.gpu_link_gbytes <= 0) or (node.nodes > 1 and node.network_gbits <= 0):
        raise InputError(f"{path}: gpu_link_gbytes or network_gbits is 0: give the rate between its {node.world} GPUs")
    return node


def load_rates(node: Node, loader: Path | None, step: Path | None) -> Rates:
    """Return measured rates for a machine. Raises InputError for files other than results of these benchmarks."""
    loader = loader or max((_HERE / "results").glob("????-??-??-loader*.json"))
    decode, record, sent = _read(loader, _decoding)
    flops = COMPUTE_SHARE * node.gpu_tflops * 1e12
    source = f"assumed, {COMPUTE_SHARE:.1%} of {node.gpu_tflops:g} TFLOP/s"
    if step is not None:
        gpu, best, rate = _read(step, _best_step)
        if node.gpu not in gpu:
            raise InputError(f"{step}: measured on {gpu}, not on {node.gpu}: leave it out, or measure there")
        flops, source = 1e12 * rate, f"{step.name}, {best}, {gpu}"
    return Rates(decode, record, sent, flops, (loader.name, source))


def _decoding(result: dict[str, Any]) -> tuple[float, float, float]:
    """Return pairs per second and core, bytes a record, and bytes a pair to the GPU, of a result of the loader."""
    first: dict[str, Any] = next((value for value in result.values() if isinstance(value, dict)), {})
    rows = (result.get("paths") or first.get("paths", {})).values()
    row = next((row for row in rows if row["name"] == "decode-only" and row["threads"] == 1), None)
    if row is None:
        raise InputError("has no decode-only with 1 thread: python -m benchmarks.loader --threads 1 --json F")
    sent = next((row["to_device_bytes"] for row in rows if row["name"] == "ffcv-gpu"), 0.0)
    return _positive(row["cpu"]["median"]), _positive(row["read_bytes"]), float(sent)


def _best_step(result: dict[str, Any]) -> tuple[str, str, float]:
    """Return the GPU, our fastest implementation and its TFLOP/s, of a result of the step."""
    rates = {name: _positive(result["tflops"][name]["median"]) for name in OURS if name in result["tflops"]}
    best = max(rates, key=lambda name: rates[name])
    return str((result.get("machine") or {}).get("gpu") or "no GPU"), best, rates[best]


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a rate")
    return float(value)


def _read(path: Path, extract: Callable[[dict[str, Any]], T]) -> T:
    """Return what `extract` reads from a benchmark's JSON. Raises InputError for other files."""
    result = read_json(path, RESULT_BYTES, _REMEDY)
    try:
        return extract(result)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not such a result ({error!r}): {_REMEDY}") from None


def plan(node: Node, rates: Rates, settings: Settings, run: dict[str, Any], images: int) -> dict[str, Any]:
    """Return limit, rate, hours and memory of a run on a machine, by the formulas above.

    run: an estimate of `engine.training.dry_run`. Raises InputError if the GPUs do not divide the batch.
    """
    batch, n = settings.data.batch, node.world
    if batch % n:
        raise InputError(
            f"{node.name}: data.batch {batch} does not divide among its {n} GPUs: choose a multiple of {n}"
        )
    resident = images * 3 * 256**2 <= RESIDENT_SHARE * node.gpu_memory_gib * 2**30  # at 256 pixels a side
    cached = images * rates.record_bytes <= CACHE_SHARE * node.memory_gib * 2**30
    parts = _parts(settings, run, node)
    exchanged = _exchanged(node, settings, run)
    sent = {
        "gradients": _sent(node, 2 * exchanged["gradients"], 2 * exchanged["gradients"]),
        "keys": _sent(node, exchanged["keys"], exchanged["keys"]),
        "crops": _sent(node, exchanged["crops"], exchanged["crops"] * n / node.nodes),
    }
    seconds = step_seconds(node, rates, settings, run, sent, parts or 1, resident=resident, cached=cached)
    limits = {name: seconds[name] for name in ("decode", "disk", "copy")}
    limits = {"GPU": seconds["compute"] + seconds["exchange"], **limits}
    limit = max(limits, key=lambda name: limits[name])
    rate = batch / limits[limit]
    hours = images * settings.optim.epochs / rate / 3600
    memory = memory_of(run, batch / n, parts or batch // n // 2 or 1) / 2**30
    cores = batch / n / limits["GPU"] / (rates.decode * CORE_SCALING)  # a GPU, which then waits for nothing
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
        "cores_a_gpu": 0.0 if resident else cores,
        "memory_gib": memory,
        "memory_by_batch_gib": {size: memory_of(run, size) / 2**30 for size in (32, 64, 128, 256, 512, 1024)},
        "page_cache_gib": images * rates.record_bytes / 2**30,
        "cached": cached,
        "busy": {
            "GPU link": sum(within for within, _ in sent.values()) / limits[limit],
            "network": sum(across for _, across in sent.values()) / limits[limit],
        },
        "exchanged_bytes_a_step": exchanged,
        "first": _advice(limit, seconds, node, cores, memory, parts),
    }


def _exchanged(node: Node, settings: Settings, run: dict[str, Any]) -> dict[str, float]:
    """Return the bytes a GPU exchanges in a step: gradients, all keys, its share of the shuffled crops."""
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


def step_seconds(
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
    """Return the seconds of a step by purpose.

    sent: seconds of GPU link and of network for gradients, keys, and crops where BatchNorm shuffles. parts: a GPU's
    batch is computed in so many. resident: decoded images stay on the GPU. cached: records stay in a node's memory.
    """
    batch, n, nodes = settings.data.batch, node.world, node.nodes
    without_gradient, with_gradient = run["norm_passes"] if settings.model.bn == "sync" and n > 1 else (0, 0)
    lockstep = parts == 1 and not (settings.compile or settings.activation_checkpointing)
    forward = max(without_gradient, with_gradient) if lockstep else without_gradient + with_gradient
    seconds = {
        "compute": max(LAUNCH_SECONDS * parts, batch / n * run["flops_a_pair"] / rates.flops),
        "decode": 0.0 if resident else batch / nodes / (rates.decode * node.cores * CORE_SCALING),
        "disk": 0.0 if cached or resident else batch / nodes * rates.record_bytes / (node.disk_gbytes * 1e9),
        "copy": 0.0 if resident else batch / n * rates.sent_bytes / (node.host_link_gbytes * 1e9),
        **{name: sum(busy) for name, busy in sent.items()},
        # one collective for each layer of synchronized BatchNorm: forward, where both encoders share it, and backward
        "norms": (forward + with_gradient) * COLLECTIVE_SECONDS[nodes > 1] * parts,
    }
    # part of the computing hides gradients and keys; crops and norms are waited for
    exposed = max(0.0, seconds["gradients"] + seconds["keys"] - seconds["compute"] * OVERLAP_SHARE)
    return seconds | {"exchange": exposed + seconds["crops"] + seconds["norms"]}


def on_cores(
    step: float, crops: float, gradients: int, batch: int, processes: int, threads: int, cores: int
) -> tuple[float, str]:
    """Return the pairs a second of training without a GPU, and their limit.

    step, crops: CPU seconds a pair. gradients: bytes. threads: loader threads of each process, which computes on one
    core. The cost of threads that wait for a core is left out: three to a core ran a fifth slower than predicted.
    """
    exchange = gradients / GLOO_BYTES_PER_SECOND if processes > 1 else 0.0
    seconds = {
        "step": batch / processes * step + exchange,
        "loader threads": batch / processes * crops / threads,
        "cores": (batch * (step + crops) + processes * exchange) / cores,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return batch / seconds[limit], limit


def _sent(node: Node, bytes_of_gpu: float, bytes_of_node: float) -> tuple[float, float]:
    """Return the seconds of the GPU link to gather these bytes on each GPU, and of the network, on each node."""
    within = (node.gpus - 1) / node.gpus * bytes_of_gpu / (node.gpu_link_gbytes * 1e9) if node.gpus > 1 else 0.0
    across = (node.nodes - 1) / node.nodes * bytes_of_node / (node.network_gbits / 8 * 1e9) if node.nodes > 1 else 0.0
    return within, across


def _parts(settings: Settings, run: dict[str, Any], node: Node) -> int:
    """Return the fewest equal parts, but at least the run's, in which a GPU's share of a batch fits; 0 if none do."""
    local_batch, limit = settings.data.batch // node.world, MEMORY_SHARE * node.gpu_memory_gib * 2**30
    possible = [
        parts for parts in range(settings.micro_batches(node.world), local_batch // 2 + 1) if local_batch % parts == 0
    ]
    return next((parts for parts in possible if memory_of(run, local_batch, parts) <= limit), 0)


def _advice(limit: str, seconds: dict[str, float], node: Node, cores: float, memory: float, parts: int) -> str:
    """Return the setting to change first."""
    if not parts:
        return (
            f"memory: {memory:.0f} GiB of {node.gpu_memory_gib:g} needed: activation_checkpointing true, or more GPUs"
        )
    if seconds["norms"] > 0.1 * seconds["compute"]:
        return "BatchNorm's collectives, two for each layer: a larger batch a GPU, or another model.bn"
    if limit == "GPU" and seconds["compute"] == LAUNCH_SECONDS:
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
        return "the exchange: gradient_dtype bfloat16, a larger batch, or model.bn plain instead of shuffle"
    return "the GPU: compile true, cuda_graph true; data.sizes [160, 192, 224] takes about 0.8 of the time"


def report(settings: Settings, plans: list[dict[str, Any]]) -> Report:
    """Return the table of plans."""
    title = f"{settings.objective}, {settings.model.arch}, batch {settings.data.batch}, {settings.optim.epochs} epochs"
    headings = ["", "limit", "pairs/s", "hours", "GPU-hours", "cores a GPU", "GiB a GPU", "page cache GiB"]
    headings += ["MB a step: gradients, keys, crops", "exchange, ms a step", "of it not hidden", "GPU link busy"]
    headings += ["network busy"]
    rows = [
        [
            row["machine"],
            row["limit"],
            f"{row['pairs_per_second']:,.0f}",
            f"{row['hours']:,.1f}",
            f"{row['gpu_hours']:,.0f}",
            f"{row['cores_a_gpu']:.1f}",
            f"{row['memory_gib']:.1f}",
            f"{row['page_cache_gib']:.0f}",
            ", ".join(f"{size / 1e6:.1f}" for size in row["exchanged_bytes_a_step"].values()),
            f"{1e3 * sum(row['seconds'][name] for name in ('gradients', 'keys', 'crops', 'norms')):.2f}",
            f"{1e3 * row['seconds']['exchange']:.2f}",
            *(f"{share:.1%}" for share in row["busy"].values()),
        ]
        for row in plans
    ]
    notes = [line for row in plans for line in _notes(settings, row)]
    return Report(title, headings, rows, [title, *notes, f"decoding: {plans[0]['sources'][0]}", *assumptions()])


def assumptions() -> list[str]:
    """Return the constants of every plan, in words."""
    within, between = (1e6 * seconds for seconds in COLLECTIVE_SECONDS)
    return [
        f"assumed: {COMPUTE_SHARE:.1%} of a GPU's published rate, if its step was not measured (COMPUTE_SHARE)",
        f"assumed: launches take {1e3 * LAUNCH_SECONDS:g} ms of each part computed at once, at least (LAUNCH_SECONDS)",
        f"assumed: cores decode {CORE_SCALING:g} times as fast as one core, times their number (CORE_SCALING)",
        f"assumed: records up to {CACHE_SHARE:g} of a node's memory are read from disk once (CACHE_SHARE)",
        f"assumed: decoded images up to {RESIDENT_SHARE:g} of a GPU's memory stay there (RESIDENT_SHARE)",
        f"assumed: {OVERLAP_SHARE:g} of the computing hides the exchange of gradients and keys, by link and network at "
        "their full published rates (OVERLAP_SHARE)",
        f"assumed: {within:g} us a collective of synchronized BatchNorm within a node, {between:g} us between nodes "
        "(COLLECTIVE_SECONDS)",
        f"assumed: a run may use {MEMORY_SHARE:g} of a GPU's memory (MEMORY_SHARE)",
    ]


def _notes(settings: Settings, row: dict[str, Any]) -> list[str]:
    name, local_batch = row["machine"], settings.data.batch // row["gpus"]
    sizes = ", ".join(f"{size}: {gib:.0f}" for size, gib in row["memory_by_batch_gib"].items())
    notes = [
        f"{name}: first {row['first']}",
        f"{name}: data.backend {row['backend']}; step: {row['sources'][1]}",
        f"{name}: GiB a GPU by pairs computed at once: {sizes}",
    ]
    if row["parts"] > settings.micro_batches(row["gpus"]):
        micro_batch = local_batch // row["parts"]
        notes.insert(0, f"{name}: {local_batch} pairs a GPU do not fit: planned with micro_batch {micro_batch}")
    return notes


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("plan", "Plan a run on another machine.")
    parser.add_argument("machines", nargs="+", metavar="MACHINE", help="name or file of a machine")
    parser.add_argument("--loader", type=Path, help="JSON of benchmarks.loader (default: the newest in results/)")
    parser.add_argument("--step", type=Path, help="JSON of benchmarks.step on a GPU of that kind")
    parser.add_argument("--images", type=int, default=1_281_167, help="default %(default)s, ImageNet")
    return parser


@command
def main() -> None:
    args, rest = parser().parse_known_args()
    require_positive(args, "images")
    settings = parse(rest)
    nodes = [load_machine(name) for name in args.machines]
    precision = "bf16" if settings.precision == "fp16" else settings.precision  # the CPU has no fp16; sizes are equal
    run = estimate(replace(settings, cpu=True, precision=precision, data=replace(settings.data, samples=args.images)))
    plans = []
    for node in nodes:
        rates = load_rates(node, args.loader, args.step)
        plans.append(plan(node, rates, settings, run, args.images) | {"sources": rates.sources})
    publish(lambda result: report(settings, plans), args, machine=machine.describe(), arguments=rest, plans=plans)


if __name__ == "__main__":
    main()
