"""Loader throughput: our backends, FFCV's own loader and the official MoCo pipeline, on the same images in one run.

    python -m benchmarks.loader --data F.beton [--backends ffcv,ffcv-gpu,dali,resident] [--threads 1,2,4] [--json OUT]

Each way is a process of its own, that builds, warms up with one epoch, and then runs epochs in turn with the others;
medians and their spread are printed. Counted are pairs (samples with all their views) a second of wall clock, and of
CPU time of all the process's threads: what one core gives. Ours and FFCV's are crops, before any color operation
(ours makes these on the device); the official pipeline's views are whole. `decode-only` is what is left for the CPU
where ffcv's crops are made on the GPU. The file stands in the page cache. Ratios are of CPU-time medians, to those of
ffcv-twice.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import machine
from benchmarks.common.paths import COMPARED, PATHS
from pipeline.storage.in_place import open_data
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command

_BASELINE = "ffcv-twice"


class Worker:
    """One way to crops, in a process of its own."""

    def __init__(self, name: str, threads: int, args: argparse.Namespace) -> None:
        self.name, self.threads = name, threads
        options = {"--data": args.data, "--size": args.size, "--views": args.views, "--batch": args.batch}
        arguments = [str(part) for pair in options.items() for part in pair]
        command = [sys.executable, "-m", "benchmarks.loader", "--worker", name, "--threads", str(threads), *arguments]
        numba = {
            "NUMBA_NUM_THREADS": str(max(threads, available_cores()))
        }  # else FFCV is refused more than there are cores
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | numba
        )

    def ask(self, what: str) -> dict[str, Any] | None:
        """Have it run an epoch, or report; return its answer, None where it failed: standard error says how."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def work(args: argparse.Namespace) -> None:
    """Be a worker: build, then answer each line of standard input by one of JSON."""
    beton = open_data(args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    path = PATHS[args.worker](beton, args.size, args.views, args.batch, int(args.threads), device)
    built = time.perf_counter() - started
    for line in sys.stdin:
        cpu, wall = _cpu_seconds(), time.perf_counter()
        if line.strip() == "about":
            gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peak += sum(child.memory_info().rss for child in psutil.Process().children())
            answer = {"to_device_bytes": path.to_device, "peak_bytes": peak, "peak_gpu_bytes": gpu, "note": path.note}
        else:
            begun: list[float] = []
            pairs = path.epoch(lambda begun=begun: begun.append(time.perf_counter()))  # type: ignore[misc]
            cpu, now = _cpu_seconds() - cpu, time.perf_counter()
            first = built + begun[0] - wall  # of the first epoch: with all compiling
            answer = {"cpu": pairs / cpu, "wall": pairs / (now - wall), "first_batch_seconds": first}
        print(json.dumps(answer), flush=True)


def _cpu_seconds() -> float:
    """Return CPU time of all threads of this process, and of the processes it has started."""
    children = (child.cpu_times() for child in psutil.Process().children())
    return time.process_time() + sum(times.user + times.system for times in children)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return rates and the rest of each way with each number of threads, by `NAME, N threads`."""
    workers: list[Worker] = []
    rates: list[list[dict[str, Any] | None]] = []
    try:
        for threads in args.threads:
            for name in args.backends:  # one after another, so that each has the machine for its first epoch
                workers.append(Worker(name, threads, args))
                rates.append([workers[-1].ask("epoch")])
        for _ in range(args.runs):
            for worker, answers in zip(workers, rates, strict=True):
                answers.append(worker.ask("epoch"))
        about = [worker.ask("about") for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    read = float(open_data(args.data).sizes.mean())
    result: dict[str, dict[str, Any]] = {}
    for worker, answers, more in zip(workers, rates, about, strict=True):
        found: list[dict[str, Any]] = [answer for answer in answers if answer is not None]
        if len(found) < len(answers) or more is None:
            print(f"{worker.name}, {worker.threads} threads: failed, see above", file=sys.stderr)
            continue
        seconds = found.pop(0)["first_batch_seconds"]
        spreads = {kind: machine.spread([rate[kind] for rate in found]) for kind in ("cpu", "wall")}
        reads = 0.0 if worker.name == "resident" else read * (args.views if worker.name == _BASELINE else 1)
        row: dict[str, Any] = {
            "name": worker.name,
            "threads": worker.threads,
            **spreads,
            "first_batch_seconds": seconds,
        }
        result[f"{worker.name}, {worker.threads}"] = {**row, "read_bytes": reads, **more}
    for row in result.values():
        base = result.get(f"{_BASELINE}, {row['threads']}")
        row["ratio"] = row["cpu"]["median"] / base["cpu"]["median"] if base else None
    return result


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table of a result."""
    rows = [
        [
            " ".join(filter(None, (row["name"], row["note"]))),
            str(row["threads"]),
            machine.told(row["cpu"], "{:.0f}"),
            machine.told(row["wall"], "{:.0f}"),
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            f"{row['read_bytes'] / 1024:.0f} KiB",
            f"{row['to_device_bytes'] / 1024:.0f} KiB",
            f"{row['first_batch_seconds']:.1f} s",
            f"{row['peak_bytes'] / 2**20:.0f} MiB",
        ]
        for row in result["paths"].values()
    ]
    headings = ["", "threads", "pairs/s a core", "pairs/s", "ratio", "read", "to device", "first batch", "memory"]
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    return machine.Report(
        "Loader throughput", headings, rows, [f"{result['data']}: {result['images']} images, {settings}"]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description="Measure loader throughput.")
    known = ",".join(COMPARED)
    parser.add_argument("--data", required=True, help="beton, or a tar that is read directly")
    parser.add_argument("--backends", default=known, help="ways to crops (default %(default)s)")
    parser.add_argument("--threads", default="1", help="loader threads, such as 1,2,4 (default %(default)s)")
    parser.add_argument("--views", type=int, default=2, help="crops of each image (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="images a batch (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="epochs measured of each (default %(default)s)")
    machine.add_outputs(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    args.threads = machine.numbers(args.threads, "--threads")
    args.backends = ["official" if name == "torchvision" else name for name in args.backends.split(",")]
    for name in args.backends:
        if name not in PATHS:
            raise InputError(f"--backends {name}: no such way to crops: choose of {', '.join(PATHS)}")
    if min(args.size, args.batch, args.views, args.runs) < 1:
        raise InputError("--size, --batch, --views and --runs must be positive: give 1 or more")
    count = len(open_data(args.data))
    if args.batch > count:
        raise InputError(f"--batch {args.batch}: {args.data} holds {count} images: give at most as many")
    return args


@command
def main() -> None:
    args = _arguments()
    if args.worker:
        work(args)
        return
    args = _checked(args)
    settings = {key: getattr(args, key) for key in ("size", "views", "batch", "threads", "runs")}
    about, rows = machine.describe(), measure(args)
    count = len(open_data(args.data))
    result = {"machine": about, "data": Path(args.data).name, "images": count, "settings": settings, "paths": rows}
    machine.tell(report(result), result, args)


if __name__ == "__main__":
    main()
