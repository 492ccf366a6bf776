"""The step with its collectives in one CUDA graph, against the same step run eagerly, in a group of one rank.

    python -m benchmarks.nccl_graph [--steps 100] [--json OUT] [--markdown OUT]
        --config engine/recipes/moco_v2_in1k.yaml [--data.batch 32] [any setting of a run]

One GPU is enough to see whether NCCL's collectives record and replay, and whether the replays compute the same: the
engine acts as on several ranks, so that it calls every collective, over a group of one (gloo without a GPU). Two models
from one seed take the same steps on one batch. Reported are the collectives of a step, the largest difference between
the two states afterwards, the time of a step, and the engine's reason where it does not record.
"""

import logging
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, require_positive
from benchmarks.common.table import Report, publish
from benchmarks.step import batch_of
from engine.config.cli import parse
from engine.config.settings import Settings
from engine.parallel import rendezvous
from engine.parallel.accelerator import build_accelerator, now
from engine.training import cuda_graph
from engine.training.cuda_graph import WARM
from engine.training.model import Model, build_model
from pipeline.loader import Batch
from pipeline.system.errors import command

_SKIPPED = ("rendezvous", "consensus", "accelerator")  # modules that talk to other ranks before there is a group


class _One(int):
    """The size of a group of one rank whose collectives are called all the same: 1, and yet more than 1."""

    def __gt__(self, other: object) -> bool:
        return isinstance(other, int) and int(self) >= int(other)

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _join_group_of_one() -> None:
    """Start the process group, and have the engine's step call its collectives."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    for name, module in list(sys.modules.items()):
        ours = name.startswith(("engine.parallel.", "engine.training.")) and not name.endswith(_SKIPPED)
        if ours and getattr(module, "world", None) is rendezvous.world:
            module.world = lambda: _One(1)  # type: ignore[attr-defined]


def _state(model: Model) -> dict[str, torch.Tensor]:
    modules = {"online": model.step.encoder, "target": model.target, "queue": model.queue}
    return {
        f"{part}.{name}": value
        for part, module in modules.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def _collectives(model: Model, batch: Batch) -> dict[str, int]:
    """Return the collectives of an eager step by name, and their number."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model.step(batch)
    names = (event.name for event in profiler.events() or [])
    return dict(Counter(name.removeprefix("c10d::").strip("_") for name in names if name.startswith("c10d::")))


def measure(settings: Settings, steps: int) -> dict[str, Any]:
    """Return the collectives, the difference of the states, milliseconds a step, and why nothing was recorded."""
    torch.backends.cudnn.deterministic = True  # else two eager runs differ too
    _join_group_of_one()
    settings = replace(settings, tracker="none", compile=False)
    accelerator = build_accelerator(settings)
    settings = replace(settings, precision=accelerator.mixed_precision)
    batch = batch_of(settings, accelerator.device)
    messages = _Messages()
    logging.getLogger(cuda_graph.__name__).addHandler(messages)
    states, milliseconds, collectives = {}, {}, {}
    for name in ("eager", "graph"):
        model = build_model(replace(settings, cuda_graph=name == "graph"), accelerator)
        for _ in range(WARM + 1):
            model.step(batch)
        begin = now(accelerator.device)
        for _ in range(steps):
            model.step(batch)
        milliseconds[name] = 1000 * (now(accelerator.device) - begin) / steps
        states[name] = {key: value.clone() for key, value in _state(model).items()}
        if name == "eager":
            collectives = _collectives(model, batch)
        del model
    gaps = [float((a.double() - states["graph"][key].double()).abs().max()) for key, a in states["eager"].items()]
    scale = max(float(a.double().abs().max()) for a in states["eager"].values())
    distributed.destroy_process_group()
    return {
        "device": accelerator.device.type,
        "steps": steps,
        "collectives": collectives,
        "milliseconds": milliseconds,
        "refusal": next((text for text in messages.texts if "cuda_graph" in text), None),
        "equal": all(gap == 0 for gap in gaps),
        "largest_difference": max(gaps),
        "largest_value": scale,
    }


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    taken, collectives = result["milliseconds"], result["collectives"]
    rows = [[name, f"{taken[name]:.2f}"] for name in taken]
    listed = ", ".join(f"{count} {name}" for name, count in collectives.items())
    equal = "equal, bit by bit" if result["equal"] else f"differ by at most {result['largest_difference']:.2g}"
    notes = [
        f"{result['refusal']}" if result["refusal"] else "the whole step was recorded and replayed",
        f"a step has {sum(collectives.values())} collectives: {listed}",
        f"states after {result['steps']} steps of each: {equal} (largest value {result['largest_value']:.3g})",
        f"eager to graph: {taken['eager'] / taken['graph']:.2f}",
    ]
    return Report("A step with collectives as one CUDA graph", ["", "ms a step"], rows, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("nccl_graph", "Compare a CUDA graph with collectives in it to eager steps.")
    parser.add_argument("--steps", type=int, default=100, help="steps of each (default %(default)s)")
    return parser


@command
def main() -> None:
    args, rest = parser().parse_known_args()
    require_positive(args, "steps")
    settings = parse(rest)
    about, taken = machine.describe(), measure(settings, args.steps)
    publish(report, args, machine=about, arguments=rest, **taken)


if __name__ == "__main__":
    main()
