"""Training on real data end to end, against the same step on one batch that lies on the device.

    python -m benchmarks.train [--steps 50] [--rounds 5] [--json OUT] [--markdown OUT]
        --config engine/recipes/moco_v2_in1k.yaml --data.train F.beton [any setting of a run]

Training is what a run does: batches of the loader, and a measured step and a line of metrics every `log_every` steps.
Rounds of both alternate, on the same model; their medians, the ratio of each pair of rounds, and the share of the
time that training waited for data are printed. On a CPU the loader works on the cores that train: there the ratio says
what decoding and augmentation cost, not what they hold up.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import machine
from engine.config.cli import parse
from engine.config.settings import Settings
from engine.parallel.accelerator import now
from engine.training.build import Run, build
from engine.training.cuda_graph import WARM
from engine.training.loop import train_on
from pipeline.system.errors import InputError, command


def measure(settings: Settings, steps: int, rounds: int) -> dict[str, Any]:
    """Return pairs a second of training and of the bare step, their ratio, and the share of data-wait."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = replace(settings, out=folder, tracker="none")
        chosen.knn.every = 0
        run = build(chosen)
        try:
            return _measure(run, steps, rounds)
        finally:
            run.close()
            run.accelerator.free_memory()


def _measure(run: Run, steps: int, rounds: int) -> dict[str, Any]:
    endless = run.loader.endless()
    kept = next(endless)
    kept = replace(kept, views=tuple(view if view is None else view.clone() for view in kept.views))
    for _ in range(WARM + 1):
        run.model.step(kept)
    for batch in itertools.islice(endless, WARM + 1):  # compiles, records, and fills the loader
        train_on(run, batch, logs=True)
    trained, bare, waits, busy = [], [], [], []
    for _ in range(rounds):
        begun, waited = now(run.accelerator.device), 0.0
        for batch in itertools.islice(endless, steps):
            train_on(run, batch, logs=(run.done + 1) % run.settings.log_every == 0)
            waited += batch.waited
        trained.append(now(run.accelerator.device) - begun)
        waits.append(waited / trained[-1])
        busy.append(_utilization(run))
        begun = now(run.accelerator.device)
        for _ in range(steps):
            run.model.step(kept)
        bare.append(now(run.accelerator.device) - begun)
    pairs = steps * run.settings.data.batch
    return {
        "device": run.accelerator.device.type,
        "backend": f"{run.data.backend.name} ({run.data.backend.why})",
        "log_every": run.settings.log_every,
        "training": machine.spread([pairs / taken for taken in trained]),
        "step": machine.spread([pairs / taken for taken in bare]),
        "ratio": machine.spread([b / a for a, b in zip(trained, bare, strict=True)]),
        "data_wait_share": machine.spread(waits),
        "gpu_utilization": [share for share in busy if share is not None],
    }


def _utilization(run: Run) -> int | None:
    """Return the percentage of time that the GPU was busy lately, where NVML says."""
    if run.accelerator.device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization()
    except (ModuleNotFoundError, RuntimeError):
        return None


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description="Time training on real data.")
    parser.add_argument("--steps", type=int, default=50, help="of a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of training, and of bare steps (default %(default)s)")
    machine.add_outputs(parser)
    args, rest = parser.parse_known_args()
    if min(args.steps, args.rounds) < 1:
        raise InputError("--steps and --rounds must be positive: give 1 or more")
    settings = parse(rest)
    about = machine.describe()
    result: dict[str, Any] = {"machine": about, "arguments": rest, "steps": args.steps, "rounds": args.rounds}
    result |= measure(settings, args.steps, args.rounds)
    machine.tell(report(result), result, args)


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table of a result."""
    rows = [
        [name, *machine.texts(result[key], form)]
        for key, name, form in (
            ("training", "training, pairs/s", "{:.1f}"),
            ("step", "bare step, pairs/s", "{:.1f}"),
            ("ratio", "ratio", "{:.3f}"),
            ("data_wait_share", "data-wait", "{:.1%}"),
        )
    ]
    notes = [
        f"{result['rounds']} rounds of {result['steps']} steps of each; a line of metrics every "
        f"{result['log_every']} steps",
        f"data.backend: {result['backend']}",
    ]
    if result["gpu_utilization"]:
        notes.append(f"GPU utilization (NVML): {', '.join(f'{share} %' for share in result['gpu_utilization'])}")
    return machine.Report("Training on real data", ["", "median", "least", "most"], rows, notes)


if __name__ == "__main__":
    main()
