"""Loader throughput: our backends, FFCV's own loader and the official MoCo pipeline, on the same images in one run.

    python -m benchmarks.loader --data F.beton [--compare ffcv,ffcv-gpu,dali,resident] [--threads 1,2,4] [--json OUT]

Each loader has a process of its own: it builds, warms up for one epoch, and then runs epochs in turn with the others.
Rates are pairs (a sample with all its views) per second of wall clock, and of CPU time over all the process's threads,
which is the rate of one core; median and spread over epochs. Ours and FFCV's views are crops without color operations
(ours run on the device); the official pipeline's are complete. `decode-only` is the CPU's part of ffcv where a GPU
crops. The file is in the page cache. Ratios compare medians by CPU time to those of ffcv-twice.
"""

import argparse
import json
import logging
import os
import resource
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, numbers, require_positive
from benchmarks.common.paths import COMPARED, PATHS
from benchmarks.common.processes import JsonProcess
from benchmarks.common.table import Report, publish, spread, spread_cell
from pipeline.storage.in_place import open_data
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, command

_BASELINE = "ffcv-twice"
logger = logging.getLogger(__name__)


def work(args: argparse.Namespace) -> None:
    """Run one loader's process: build it, then answer each line of standard input with a line of JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    path = PATHS[args.worker](open_data(args.data), args.size, args.views, args.batch, int(args.threads), device)
    build_seconds = time.perf_counter() - begin
    for line in sys.stdin:
        if line.strip() == "about":
            gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peak += sum(child.memory_info().rss for child in psutil.Process().children())
            answer = {"to_device_bytes": path.to_device, "peak_bytes": peak, "peak_gpu_bytes": gpu, "note": path.note}
        else:
            cpu, wall = _cpu_seconds(), time.perf_counter()
            first: list[float] = []
            pairs = path.epoch(lambda first=first: first.append(time.perf_counter()))  # type: ignore[misc]
            cpu, end = _cpu_seconds() - cpu, time.perf_counter()
            answer = {"cpu": pairs / cpu, "wall": pairs / (end - wall)}
            answer["first_batch_seconds"] = build_seconds + first[0] - wall  # in the first epoch with all compilation
        print(json.dumps(answer), flush=True)


def _cpu_seconds() -> float:
    """Return the CPU time of this process's threads and of its child processes."""
    children = (child.cpu_times() for child in psutil.Process().children())
    return time.process_time() + sum(times.user + times.system for times in children)


def _start(name: str, threads: int, args: argparse.Namespace) -> JsonProcess:
    call = [sys.executable, "-m", "benchmarks.loader", "--worker", name, "--threads", str(threads)]
    for option in ("data", "size", "views", "batch"):
        call += [f"--{option}", str(getattr(args, option))]
    # FFCV gets no more threads than numba's pool has
    return JsonProcess(call, os.environ | {"NUMBA_NUM_THREADS": str(max(threads, available_cores()))})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return rates and memory of each loader with each number of threads, by `NAME, THREADS`."""
    processes: dict[tuple[str, int], JsonProcess] = {}
    answers: dict[tuple[str, int], list[dict[str, Any] | None]] = {}
    with ExitStack() as stack:
        for threads in args.threads:
            for name in args.compare:  # one after another: each has the machine to itself for its first epoch
                process = stack.enter_context(closing(_start(name, threads, args)))
                processes[name, threads], answers[name, threads] = process, [process.ask("epoch")]
        for _ in range(args.runs):
            for key, process in processes.items():
                answers[key].append(process.ask("epoch"))
        about = {key: process.ask("about") for key, process in processes.items()}
    record_bytes = float(open_data(args.data).sizes.mean())
    rows: dict[str, dict[str, Any]] = {}
    for (name, threads), epochs in answers.items():
        first, *rates = [epoch for epoch in epochs if epoch is not None] or [{}]
        if len(rates) < args.runs or (memory := about[name, threads]) is None:
            logger.warning(f"{name}, {threads} threads: failed, see above")
            continue
        decodes = {"resident": 0, _BASELINE: args.views}.get(name, 1)
        rows[f"{name}, {threads}"] = {
            "name": name,
            "threads": threads,
            **{kind: spread([rate[kind] for rate in rates]) for kind in ("cpu", "wall")},
            "first_batch_seconds": first["first_batch_seconds"],
            "read_bytes": record_bytes * decodes,
            **memory,
        }
    for row in rows.values():
        base = rows.get(f"{_BASELINE}, {row['threads']}")
        row["ratio"] = row["cpu"]["median"] / base["cpu"]["median"] if base else None
    return rows


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows = [
        [
            " ".join(filter(None, (row["name"], row["note"]))),
            str(row["threads"]),
            spread_cell(row["cpu"], "{:.0f}"),
            spread_cell(row["wall"], "{:.0f}"),
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
    return Report("Loader throughput", headings, rows, [f"{result['data']}: {result['images']} images, {settings}"])


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("loader", "Measure loader throughput.", {"--backends": "--compare"})
    parser.add_argument("--data", required=True, help="beton, or a tar that is read directly")
    names = ", ".join(PATHS)
    parser.add_argument("--compare", default=",".join(COMPARED), help=f"some of {names} (default %(default)s)")
    parser.add_argument("--threads", default="1", help="loader threads, such as 1,2,4 (default %(default)s)")
    parser.add_argument("--views", type=int, default=2, help="crops of each image (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of a crop, pixels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="images a batch (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="epochs timed of each (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


@command
def main() -> None:
    args = parser().parse_args()
    if args.worker:
        work(args)
        return
    args.threads, args.compare = numbers(args.threads, "--threads"), args.compare.split(",")
    for name in args.compare:
        if name not in PATHS:
            raise InputError(f"--compare {name}: no such loader: choose one of {', '.join(PATHS)}")
    require_positive(args, "size", "batch", "views", "runs")
    count = len(open_data(args.data))
    if args.batch > count:
        raise InputError(f"--batch {args.batch}: {args.data} has {count} images: give at most as many")
    settings = {key: getattr(args, key) for key in ("size", "views", "batch", "threads", "runs")}
    about, paths = machine.describe(), measure(args)
    publish(report, args, machine=about, data=Path(args.data).name, images=count, settings=settings, paths=paths)


if __name__ == "__main__":
    main()
