"""Training on real data, end to end, against the same step on one batch that lies on the device.

    python -m benchmarks.train [--steps 50] [--runs 5] [--trace OUT.json.gz] [--json OUT] [--markdown OUT]
        --config engine/recipes/moco_v2_in1k.yaml --data.train F.beton [any setting of a run]

Training does what a run does: batches from the loader, and every `log_every` steps a measured step and a line of
metrics. Runs of both alternate on the same model. Reported are medians, the ratio of each pair of runs, and the share
of the time that training waited for data, and the peak of GPU memory. --trace writes three steps as a trace of torch's
profiler, for Perfetto. On a CPU the loader shares its cores with training: there the ratio is the
cost of decoding and augmentation, not a wait for them.
"""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, require_positive
from benchmarks.common.table import Report, publish, spread, spread_cells
from engine.config.cli import parse
from engine.config.settings import Settings
from engine.parallel.accelerator import now
from engine.training.build import Run, build
from engine.training.cuda_graph import WARM
from engine.training.loop import train_on
from pipeline.system.errors import command

_TRACED_STEPS = 3


def measure(settings: Settings, steps: int, runs: int, trace: Path | None = None) -> dict[str, Any]:
    """Return pairs a second of training and of the bare step, their ratio, and the share of data-wait."""
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, out=folder, tracker="none")
        settings.knn.every = 0
        run = build(settings)
        try:
            result = _measure(run, steps, runs)
            if trace is not None:
                _trace(run, trace)
            return result
        finally:
            run.close()
            run.accelerator.free_memory()


def _measure(run: Run, steps: int, runs: int) -> dict[str, Any]:
    batches = run.loader.endless()
    fixed = next(batches)
    fixed = replace(fixed, views=tuple(view if view is None else view.clone() for view in fixed.views))
    for _ in range(WARM + 1):
        run.model.step(fixed)
    for batch in itertools.islice(batches, WARM + 1):  # compiles, records, and fills the loader
        train_on(run, batch, logs=True)
    training, bare, waits, utilization = [], [], [], []
    for _ in range(runs):
        begin, waited = now(run.accelerator.device), 0.0
        for batch in itertools.islice(batches, steps):
            train_on(run, batch, logs=(run.done + 1) % run.settings.log_every == 0)
            waited += batch.waited
        training.append(now(run.accelerator.device) - begin)
        waits.append(waited / training[-1])
        utilization.append(_utilization(run))
        begin = now(run.accelerator.device)
        for _ in range(steps):
            run.model.step(fixed)
        bare.append(now(run.accelerator.device) - begin)
    pairs = steps * run.settings.data.batch
    return {
        "device": run.accelerator.device.type,
        "backend": f"{run.data.backend.name} ({run.data.backend.why})",
        "log_every": run.settings.log_every,
        "training": spread([pairs / seconds for seconds in training]),
        "step": spread([pairs / seconds for seconds in bare]),
        "ratio": spread([b / a for a, b in zip(training, bare, strict=True)]),
        "data_wait_share": spread(waits),
        "peak_bytes": torch.cuda.max_memory_allocated() if run.accelerator.device.type == "cuda" else None,
        "gpu_utilization": [percent for percent in utilization if percent is not None],
    }


def _trace(run: Run, path: Path) -> None:
    """Write a trace of a few steps of training."""
    with torch.profiler.profile() as profiler:
        for batch in itertools.islice(run.loader.endless(), _TRACED_STEPS):
            train_on(run, batch, logs=False)
        now(run.accelerator.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def _utilization(run: Run) -> int | None:
    """Return the percentage of the recent time that the GPU was busy, by NVML; None if unknown."""
    if run.accelerator.device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization()
    except (ModuleNotFoundError, RuntimeError):
        return None


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows = [
        [name, *spread_cells(result[key], form)]
        for key, name, form in (
            ("training", "training, pairs/s", "{:.1f}"),
            ("step", "bare step, pairs/s", "{:.1f}"),
            ("ratio", "ratio", "{:.3f}"),
            ("data_wait_share", "data-wait", "{:.1%}"),
        )
    ]
    notes = [
        f"{result['runs']} runs of {result['steps']} steps of each; a line of metrics every "
        f"{result['log_every']} steps",
        f"data.backend: {result['backend']}",
    ]
    if result["peak_bytes"]:
        notes.append(f"GPU memory: at most {result['peak_bytes'] / 2**30:.1f} GiB allocated")
    if result["gpu_utilization"]:
        notes.append(f"GPU utilization (NVML): {', '.join(f'{share} %' for share in result['gpu_utilization'])}")
    return Report("Training on real data", ["", "median", "min", "max"], rows, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("train", "Time training on real data.", {"--rounds": "--runs"})
    parser.add_argument("--steps", type=int, default=50, help="steps of a run (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs of training, and of bare steps (default %(default)s)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace of a few steps here (.json or .json.gz)"
    )
    return parser


@command
def main() -> None:
    args, rest = parser().parse_known_args()
    require_positive(args, "steps", "runs")
    settings = parse(rest)
    about, taken = machine.describe(), measure(settings, args.steps, args.runs, args.trace)
    publish(report, args, machine=about, arguments=rest, steps=args.steps, runs=args.runs, **taken)


if __name__ == "__main__":
    main()
