"""Training in several processes on this machine's cores: what more of them cost, and what `benchmarks.plan` foresaw.

    python -m benchmarks.scaling [--processes 1,2] [--threads 1,2] [--steps 30] [--rounds 5] [--json OUT]
        [--markdown OUT] --config R.yaml --data.train F.beton [any setting of a run]

Runs that train on real data, taking turns, each process computing with one thread, in two parts. Scaling: the most
`--processes` n, each bound to a core of its own, against one on one core; between them one process with its share of
the batch (what smaller batches cost), and n that train apart (what sharing the machine costs); the rest is the
exchange, and waiting for each other. Prediction: every number of processes and loader threads on all cores, and beside
it what `benchmarks.plan.on_cores` says from the CPU seconds that `benchmarks.step` and `benchmarks.loader` measure.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.plan import on_cores
from engine.config.cli import parse
from engine.training.build import build
from engine.training.loop import train_on
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command

_WARM = 5  # steps before each round: its first batches were made while it waited for its turn


@dataclass(frozen=True)
class Way:
    """Processes that train at the same time."""

    name: str
    processes: int
    batch: int
    """Of all of them, or of each where they train apart."""
    threads: int
    """Of each loader."""
    apart: bool = False
    bound: bool = False
    """Each to a core of its own."""


class Group:
    """The processes of a way; they wait between rounds."""

    def __init__(self, way: Way, rest: list[str], steps: int, folder: Path) -> None:
        self.way, self._steps = way, steps
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = [self._start(rank, port, rest, folder) for rank in range(way.processes)]

    def _start(self, rank: int, port: int, rest: list[str], folder: Path) -> subprocess.Popen[str]:
        way = self.way
        world: dict[str, int | str] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": way.processes,
            "LOCAL_WORLD_SIZE": way.processes,
        }
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        alone = way.apart or way.processes == 1
        environment = {key: value for key, value in os.environ.items() if key not in world}
        environment |= {"OMP_NUM_THREADS": "1"} | ({} if alone else {k: str(v) for k, v in world.items()})
        call = [
            sys.executable,
            "-m",
            "benchmarks.scaling",
            "--worker",
            "--steps",
            str(self._steps),
            *rest,
            "--cpu",
            "true",
        ]
        call += ["--data.batch", str(way.batch), "--data.workers", str(way.threads), "--data.eval", ""]
        call += ["--knn.every", "0", "--tracker", "none", "--out", str(folder / f"{way.name} {rank}")]
        if way.bound:
            call = ["taskset", "--cpu-list", str(sorted(os.sched_getaffinity(0))[rank]), *call]
        return subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def round(self) -> dict[str, float]:
        """Have all of them train; return pairs a second together, CPU seconds a pair, and the share of data-wait."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = []
        for process in self._processes:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("{")), None)
            if line is None:
                raise InputError(f"{self.way.name}: a process failed: see above")
            told.append(json.loads(line))
        pairs = self._steps * self.way.batch
        if self.way.apart:
            rate, pairs = sum(pairs / one["wall"] for one in told), pairs * len(told)
        else:
            rate = pairs / max(one["wall"] for one in told)
        waited = sum(one["waited"] / one["wall"] for one in told) / len(told)
        return {"rate": rate, "cpu": sum(one["cpu"] for one in told) / pairs, "waited": waited}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()


def work(rest: list[str], steps: int) -> None:
    """Be one process: build the run, then train a round for each line of standard input."""
    run = build(parse(rest))
    batches = run.loader.endless()
    try:
        for _ in sys.stdin:
            for batch in islice(batches, _WARM):
                train_on(run, batch, logs=False)
            waited, cpu, wall = 0.0, time.process_time(), time.perf_counter()
            for batch in islice(batches, steps):
                train_on(run, batch, logs=False)
                waited += batch.waited
            told = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "waited": waited}
            print(json.dumps(told), flush=True)
    finally:
        run.close()


def measure(rest: list[str], processes: list[int], threads: list[int], steps: int, rounds: int) -> dict[str, Any]:
    """Return rates of all ways, of the second table with what was predicted."""
    settings = parse(rest)
    batch, most = settings.data.batch, max(processes)
    scaling = [
        Way("1 process, 1 core", 1, batch, threads[0], bound=True),
        Way(f"1 process, 1 core, batch / {most}", 1, batch // most, threads[0], bound=True),
        Way(f"{most} processes apart, {most} cores", most, batch // most, threads[0], apart=True, bound=True),
        Way(f"{most} processes, {most} cores", most, batch, threads[0], bound=True),
    ]
    free = [Way(f"{p} processes, {t} threads", p, batch, t) for p in processes for t in threads]
    with tempfile.TemporaryDirectory() as folder:
        predictions = {way.name: predict(way, rest, Path(folder)) for way in free}
        groups: list[Group] = []
        try:
            for way in (*scaling, *free):
                groups.append(Group(way, rest, steps, Path(folder)))
            told = [[group.round() for group in groups] for _ in range(rounds + 1)][1:]
        finally:
            for group in groups:
                group.close()
    found = {
        group.way.name: {key: machine.spread([taken[i][key] for taken in told]) for key in ("rate", "cpu", "waited")}
        for i, group in enumerate(groups)
    }
    for name, prediction in predictions.items():
        found[name] |= prediction | {"ratio": prediction["predicted"] / found[name]["rate"]["median"]}
    one, small, apart, together = ([taken[i]["rate"] for taken in told] for i in range(4))

    def ratio(above: list[float], below: list[float], times: int = 1) -> dict[str, float]:
        return machine.spread([a / (times * b) for a, b in zip(above, below, strict=True)])

    efficiency = {
        "in all": ratio(together, one, most),
        "of smaller batches": ratio(small, one),
        "of sharing the machine": ratio(apart, small, most),
        "of exchange and waiting for each other": ratio(together, apart),
    }
    return {
        "scaling": {way.name: found[way.name] for way in scaling},
        "efficiency": efficiency,
        "prediction": {way.name: found[way.name] for way in free},
        "rounds": rounds,
        "steps": steps,
        "batch": batch,
    }


def predict(way: Way, rest: list[str], folder: Path) -> dict[str, Any]:
    """Return pairs a second as `benchmarks.plan` has them from what the other benchmarks measure."""
    settings, own = parse(rest), way.batch // way.processes
    step_file, loader_file = folder / f"step {own}.json", folder / "loader.json"
    if not step_file.exists():
        _run(
            "benchmarks.step",
            "--ways",
            "eager",
            "--threads",
            "1",
            *rest,
            "--data.batch",
            str(own),
            "--json",
            str(step_file),
        )
    if not loader_file.exists():
        views = ["--data", settings.data.train or "", "--size", str(settings.data.size), "--batch", str(own)]
        _run("benchmarks.loader", "--backends", "ffcv", *views, "--json", str(loader_file))
    steps, loader = json.loads(step_file.read_text()), json.loads(loader_file.read_text())
    taken = steps["ways"]["eager"]["cpu"]["median"] + steps["parts"]["augmentation"]["cpu"]["median"]
    step, crops = taken / own, 1 / loader["paths"]["ffcv, 1"]["cpu"]["median"]
    gradients = 4 * steps["trained_parameters"]
    rate, limit = on_cores(step, crops, gradients, way.batch, way.processes, way.threads, available_cores())
    return {"predicted": rate, "limit": limit, "step_seconds": step, "crops_seconds": crops}


def _run(module: str, *arguments: str) -> None:
    call = [sys.executable, "-m", module, *arguments]
    if subprocess.run(
        call, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    ).returncode:
        raise InputError(f"{module} failed: see above")


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table of a result."""
    rows = []
    for name, found in (*result["scaling"].items(), *result["prediction"].items()):
        row = [name, machine.told(found["rate"], "{:.1f}"), f"{1000 * found['cpu']['median']:.2f}"]
        row.append(f"{found['waited']['median']:.1%}")
        if "predicted" in found:
            row += [f"{found['predicted']:.1f}", f"{found['ratio']:.2f}", found["limit"]]
        rows.append(row + [""] * (7 - len(row)))
    notes = [f"{result['rounds']} rounds of {result['steps']} steps, batch {result['batch']}: median (least-most)"]
    notes += [f"efficiency {name}: {machine.told(spread, '{:.2f}')}" for name, spread in result["efficiency"].items()]
    headings = ["", "pairs/s", "CPU ms a pair", "data-wait", "predicted", "to measured", "limit"]
    return machine.Report("Training in several processes", headings, rows, notes)


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Time several processes.")
    parser.add_argument("--processes", default="1,2", help="default %(default)s")
    parser.add_argument("--threads", default="1,2", help="of each process's loader (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    machine.add_outputs(parser)
    args, rest = parser.parse_known_args()
    if args.worker:
        work(rest, args.steps)
        return
    processes = machine.numbers(args.processes, "--processes")
    threads = machine.numbers(args.threads, "--threads")
    if min(args.steps, args.rounds) < 1:
        raise InputError("--steps and --rounds must be positive: give 1 or more")
    if max(processes) > available_cores():
        raise InputError(f"--processes {args.processes}: there are {available_cores()} cores: give at most as many")
    settings = parse(rest)
    if not settings.data.train:
        raise InputError("data.train is not set: give a beton")
    for number in processes:
        if settings.data.batch % number:
            raise InputError(f"data.batch {settings.data.batch} does not divide among {number}: choose a multiple")
    about = machine.describe()
    result: dict[str, Any] = {"machine": about, "arguments": rest}
    result |= measure(rest, processes, threads, args.steps, args.rounds)
    machine.tell(report(result), result, args)


if __name__ == "__main__":
    main()
