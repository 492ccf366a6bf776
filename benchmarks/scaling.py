"""Training on several processes on this machine's cores: their cost, and the prediction of `benchmarks.plan`.

    python -m benchmarks.scaling [--processes 1,2] [--threads 1,2] [--steps 30] [--runs 5] [--json OUT]
        [--markdown OUT] --config R.yaml --data.train F.beton [any setting of a run]

Groups of processes train on real data in turn; each process computes with one thread.

- Scaling: the largest number n of `--processes`, each bound to a core of its own, against one process on one core. Two
  steps lie between: one process with its share of the batch (the cost of smaller batches), and n that train separately
  (the cost of sharing the machine). The rest is the exchange, and waiting for each other.
- Prediction: every number of processes and loader threads on all cores, against `benchmarks.plan.on_cores` with the CPU
  seconds that `benchmarks.step` and `benchmarks.loader` measure.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, numbers, require_positive
from benchmarks.common.processes import JsonProcess
from benchmarks.common.table import Report, publish, spread, spread_cell
from benchmarks.plan import on_cores
from engine.config.cli import parse
from engine.training.build import build
from engine.training.loop import train_on
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command

_WARMUP_STEPS = 5  # before each run: the first batches were loaded while the group waited for its turn


@dataclass(frozen=True)
class Setup:
    """Processes that train at the same time."""

    name: str
    processes: int
    batch: int
    """Global batch; with `separate`, the batch of each process."""
    threads: int
    """Loader threads of each process."""
    separate: bool = False
    """Processes train separate models."""
    bound: bool = False
    """Each process is bound to a core of its own."""


class Group:
    """The processes of a setup; they wait between runs."""

    def __init__(self, setup: Setup, rest: list[str], steps: int, folder: Path) -> None:
        self.setup, self._steps = setup, steps
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = [self._start(rank, port, rest, folder) for rank in range(setup.processes)]

    def _start(self, rank: int, port: int, rest: list[str], folder: Path) -> JsonProcess:
        setup, n = self.setup, self.setup.processes
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        world_environment = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in world.items()}}
        environment = {key: value for key, value in os.environ.items() if key not in world_environment}
        environment["OMP_NUM_THREADS"] = "1"
        if n > 1 and not setup.separate:
            environment |= world_environment
        call = [sys.executable, "-m", "benchmarks.scaling", "--worker", "--steps", str(self._steps), *rest]
        call += ["--cpu", "true", "--data.batch", str(setup.batch), "--data.workers", str(setup.threads)]
        call += ["--data.eval", "", "--knn.every", "0", "--tracker", "none"]
        call += ["--out", str(folder / f"{setup.name} {rank}")]
        if setup.bound:
            call = ["taskset", "--cpu-list", str(sorted(os.sched_getaffinity(0))[rank]), *call]
        return JsonProcess(call, environment)

    def train(self) -> dict[str, float]:
        """Train one run; return pairs a second of all processes, CPU seconds a pair, and the share of data-wait."""
        for process in self._processes:
            process.send("train")
        answers = []
        for process in self._processes:
            if (answer := process.receive()) is None:
                raise InputError(f"{self.setup.name}: a process failed: see above")
            answers.append(answer)
        pairs = self._steps * self.setup.batch
        if self.setup.separate:
            rate, pairs = sum(pairs / answer["wall"] for answer in answers), pairs * len(answers)
        else:
            rate = pairs / max(answer["wall"] for answer in answers)
        waited = sum(answer["waited"] / answer["wall"] for answer in answers) / len(answers)
        return {"rate": rate, "cpu": sum(answer["cpu"] for answer in answers) / pairs, "waited": waited}

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.close()


def work(rest: list[str], steps: int) -> None:
    """Run one training process: build the run, then train `steps` steps for each line of standard input."""
    run = build(parse(rest))
    batches = run.loader.endless()
    try:
        for _ in sys.stdin:
            for batch in islice(batches, _WARMUP_STEPS):
                train_on(run, batch, logs=False)
            waited, cpu, wall = 0.0, time.process_time(), time.perf_counter()
            for batch in islice(batches, steps):
                train_on(run, batch, logs=False)
                waited += batch.waited
            answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "waited": waited}
            print(json.dumps(answer), flush=True)
    finally:
        run.close()


def measure(rest: list[str], processes: list[int], threads: list[int], steps: int, runs: int) -> dict[str, Any]:
    """Return rates of all setups, efficiencies, and predictions."""
    batch, n = parse(rest).data.batch, max(processes)
    scaling = [
        Setup("1 process, 1 core", 1, batch, threads[0], bound=True),
        Setup(f"1 process, 1 core, batch / {n}", 1, batch // n, threads[0], bound=True),
        Setup(f"{n} processes apart, {n} cores", n, batch // n, threads[0], separate=True, bound=True),
        Setup(f"{n} processes, {n} cores", n, batch, threads[0], bound=True),
    ]
    free = [Setup(f"{p} processes, {t} threads", p, batch, t) for p in processes for t in threads]
    with tempfile.TemporaryDirectory() as folder:
        predictions = {setup.name: predict(setup, rest, Path(folder)) for setup in free}
        with ExitStack() as stack:
            groups = [
                stack.enter_context(closing(Group(setup, rest, steps, Path(folder)))) for setup in (*scaling, *free)
            ]
            taken = [[group.train() for group in groups] for _ in range(1 + runs)][1:]
    rows: dict[str, dict[str, Any]] = {
        group.setup.name: {key: spread([run[i][key] for run in taken]) for key in ("rate", "cpu", "waited")}
        for i, group in enumerate(groups)
    }
    for name, prediction in predictions.items():
        rows[name] |= prediction | {"ratio": prediction["predicted"] / rows[name]["rate"]["median"]}
    one, small, separate, joined = ([run[i]["rate"] for run in taken] for i in range(4))

    def ratio(above: list[float], below: list[float], factor: int = 1) -> dict[str, float]:
        return spread([a / (factor * b) for a, b in zip(above, below, strict=True)])

    efficiency = {
        "in all": ratio(joined, one, n),
        "of smaller batches": ratio(small, one),
        "of sharing the machine": ratio(separate, small, n),
        "of exchange and waiting for each other": ratio(joined, separate),
    }
    return {
        "scaling": {setup.name: rows[setup.name] for setup in scaling},
        "efficiency": efficiency,
        "prediction": {setup.name: rows[setup.name] for setup in free},
        "runs": runs,
        "steps": steps,
        "batch": batch,
    }


def predict(setup: Setup, rest: list[str], folder: Path) -> dict[str, Any]:
    """Return pairs a second as `benchmarks.plan` predicts them from the other benchmarks' measurements."""
    settings, local_batch = parse(rest), setup.batch // setup.processes
    step_file, loader_file = folder / f"step {local_batch}.json", folder / "loader.json"
    if not step_file.exists():
        options = ["--compare", "eager", "--torch-threads", "1", "--data.batch", str(local_batch)]
        _run("benchmarks.step", *rest, *options, "--json", str(step_file))
    if not loader_file.exists():
        options = ["--data", settings.data.train or "", "--size", str(settings.data.size), "--batch", str(local_batch)]
        _run("benchmarks.loader", "--compare", "ffcv", *options, "--json", str(loader_file))
    steps, loader = json.loads(step_file.read_text()), json.loads(loader_file.read_text())
    seconds = steps["ways"]["eager"]["cpu"]["median"] + steps["parts"]["augmentation"]["cpu"]["median"]
    step, crops = seconds / local_batch, 1 / loader["paths"]["ffcv, 1"]["cpu"]["median"]
    gradients = 4 * steps["trained_parameters"]
    rate, limit = on_cores(step, crops, gradients, setup.batch, setup.processes, setup.threads, available_cores())
    return {"predicted": rate, "limit": limit, "step_seconds": step, "crops_seconds": crops}


def _run(module: str, *arguments: str) -> None:
    call, environment = [sys.executable, "-m", module, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run(call, stdout=subprocess.DEVNULL, env=environment, check=False).returncode:
        raise InputError(f"{module} failed: see above")


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows = []
    for name, taken in (*result["scaling"].items(), *result["prediction"].items()):
        row = [name, spread_cell(taken["rate"], "{:.1f}"), f"{1000 * taken['cpu']['median']:.2f}"]
        row.append(f"{taken['waited']['median']:.1%}")
        if "predicted" in taken:
            row += [f"{taken['predicted']:.1f}", f"{taken['ratio']:.2f}", taken["limit"]]
        rows.append(row + [""] * (7 - len(row)))
    notes = [f"{result['runs']} runs of {result['steps']} steps, batch {result['batch']}: median (min-max)"]
    notes += [f"efficiency {name}: {spread_cell(ratio, '{:.2f}')}" for name, ratio in result["efficiency"].items()]
    headings = ["", "pairs/s", "CPU ms a pair", "data-wait", "predicted", "to measured", "limit"]
    return Report("Training on several processes", headings, rows, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("scaling", "Time training on several processes.", {"--rounds": "--runs"})
    parser.add_argument("--processes", default="1,2", help="numbers of processes (default %(default)s)")
    parser.add_argument("--threads", default="1,2", help="loader threads of a process (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a run (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each setup (default %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


@command
def main() -> None:
    args, rest = parser().parse_known_args()
    if args.worker:
        work(rest, args.steps)
        return
    processes, threads = numbers(args.processes, "--processes"), numbers(args.threads, "--threads")
    require_positive(args, "steps", "runs")
    if max(processes) > available_cores():
        raise InputError(f"--processes {args.processes}: there are {available_cores()} cores: give at most as many")
    settings = parse(rest)
    if not settings.data.train:
        raise InputError("data.train is not set: give a beton")
    for number in processes:
        if settings.data.batch % number:
            raise InputError(f"data.batch {settings.data.batch} does not divide among {number}: choose a multiple")
    about, taken = machine.describe(), measure(rest, processes, threads, args.steps, args.runs)
    publish(report, args, machine=about, arguments=rest, **taken)


if __name__ == "__main__":
    main()
