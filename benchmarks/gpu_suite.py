"""Every GPU test and GPU benchmark, in parts of at most nine minutes, the most important first.

    python -m benchmarks.gpu_suite --out DIR [--part A --part B ...] [--data F.beton] [--cifar F.beton]
        [--seconds 540] [--cache FOLDER] [--dry-run]

- A: GPU tests of the pipeline
- B: GPU tests of training: combinations of methods, terms and precisions, and the CUDA graph
- C: training step: eager and as a CUDA graph, fp16 and bf16, cuDNN's benchmark on and off, batches of 32 and 256
- D: training step, compiled, and compiled as a CUDA graph
- E: crops and augmentation at 224 pixels, and each kernel's time
- F: training on real data against the bare step, with memory and a profiler's trace
- G: NCCL collectives within a CUDA graph, in a group of one rank
- H: loaders, with DALI, and FFCV's own

All parts run in this order until --seconds are over, or those of --part; the last line names the command that
continues. Each part is complete in itself. Results are written to DIR as they arrive: `suite.md` has each outcome, or
why it was left out, `suite.json` the figures, `failures.txt` the output of what failed. Compiled code and the drawn
images that replace missing --data and --cifar are kept in --cache. With --dry-run, or without a GPU, each part runs
small on the hardware at hand: a check of the suite itself.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import crops, loader, nccl_graph, step, train
from benchmarks.common import machine
from benchmarks.common.command_line import numbers
from benchmarks.common.paths import HARDWARE_LOADS
from benchmarks.common.processes import logged_session
from benchmarks.common.table import Report
from pipeline.backends.select_backend import PACE
from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.sources.synthetic import draw
from pipeline.storage.encode import Settings
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import command
from pipeline.system.files import write_json
from pipeline.system.packages import installed

_ROOT = Path(__file__).parents[1]
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace" / "gpu-suite"
_CACHED = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "NUMBA_CACHE_DIR": "numba"}
_DRAWN, _COPIES, _SIDES = 32, 32, (500, 375)  # large images: different ones, copies of each, width and height


@dataclass(frozen=True)
class Call:
    """One command of a part."""

    name: str
    module: str
    arguments: list[str]
    small: list[str]
    """Arguments that reduce it to seconds."""
    report: Callable[[dict[str, Any]], Report] | None
    """Makes the report from its JSON; None: the last line of its output is the report."""
    needs: tuple[str, ...] = ()
    """Packages."""


@dataclass(frozen=True)
class Part:
    """A part of the suite."""

    letter: str
    title: str
    seconds: float
    """Time limit, so that later parts get a turn."""
    calls: list[Call]


def _loader(result: dict[str, Any]) -> Report:
    """Return the loader's report, with the fewest threads that reach the pace of a GPU."""
    report, rows = loader.report(result), list(result["paths"].values())
    for name in dict.fromkeys(row["name"] for row in rows):
        enough = [row["threads"] for row in rows if row["name"] == name and row["wall"]["median"] >= PACE]
        threads = f"with {min(enough)} threads" if enough else "with none of these numbers of threads"
        report.notes.append(f"{name} reaches {PACE} pairs/s {threads}")
    return report


def parts(data: Path, cifar: Path, threads: list[int], out: Path) -> list[Part]:
    """Return the parts, the most important first."""
    counts, hardware = ",".join(map(str, threads)), ",".join(HARDWARE_LOADS)
    pytest = ["-m", "gpu", "-q", "--no-header", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    recipe, v3 = (
        ["--config", str(_ROOT / f"engine/recipes/{name}_in1k.yaml"), "--data.eval", ""]
        for name in ("moco_v2", "moco_v3")
    )
    recipe += ["--model.bn", "plain", "--data.batch", "256"]
    tiny_run = ["--model.arch", "resnet18", "--model.width", "0.25", "--data.size", "32", "--data.batch", "8"]
    tiny_run += ["--precision", "bf16", "--no-require-gpu"]
    tiny_v2 = [*tiny_run, "--method.queue_size", "64"]
    lightly = ",lightly-amp" if installed("lightly") else ""
    big, tiny = ["--data", str(data), "--batch", "512"], ["--batch", "32", "--size", "32", "--runs", "1"]
    resident = ["--data", str(cifar), "--batch", "512", "--size", "32", "--compare", "resident", "--threads", "1"]
    few = [*tiny, "--threads", "1"]

    def tests(name: str, *files: str) -> Call:
        return Call(name, "pytest", [*pytest, *files], [], None, ("pytest",))

    def steps(name: str, compared: str, *options: str, small: str = "eager") -> Call:
        arguments = [*recipe, "--compare", compared, *options]
        reduced = [*tiny_v2, "--runs", "1", "--torch-threads", "1", "--compare", small]
        return Call(name, "benchmarks.step", arguments, reduced, step.report)

    def training(name: str, backend: str, small: str, *options: str) -> Call:
        arguments = [*recipe, "--data.train", str(data), "--data.backend", backend, "--cuda_graph", "true", *options]
        reduced = [*tiny_v2, "--steps", "2", "--runs", "1", "--data.backend", small]
        return Call(name, "benchmarks.train", arguments, reduced, train.report)

    def graph(name: str, recipe: list[str], small: list[str]) -> Call:
        arguments = [*recipe, "--data.batch", "32"]
        return Call(name, "benchmarks.nccl_graph", arguments, [*small, "--steps", "2"], nccl_graph.report)

    def crop(name: str, augmentation: str, *options: str) -> Call:
        return Call(name, "benchmarks.crops", [*big, "--augmentation", augmentation, *options], tiny, crops.report)

    def rates(name: str, compared: str, threads: str, *needs: str) -> Call:
        arguments = [*big, "--compare", compared, "--threads", threads]
        return Call(name, "benchmarks.loader", arguments, few, _loader, needs)

    fast = ["--no-parts", "--cudnn-benchmark"]
    both, trace = "eager,eager-graph", str(out / "trace.json.gz")
    return [
        Part("A", "GPU tests of the pipeline", 240, [tests("tests of the pipeline", "tests/pipeline")]),
        Part("B", "GPU tests of training", 300, [tests("tests of training", "tests/engine", "tests/methods")]),
        Part("C", "training step", 300, [
            steps("step", f"{both},official-amp{lightly}", "--cudnn-benchmark", "on", small=both),
            steps("step, cudnn.benchmark off", both, *fast, "off"),
            steps("step, batch 32", both, *fast, "on", "--data.batch", "32"),
            steps("step, fp16", both, *fast, "on", "--precision", "fp16"),
        ]),
        Part("D", "training step, compiled", 360, [
            steps("compiled", "eager,compiled,graph", *fast, "on", small="graph"),
        ]),
        Part("E", "crops and augmentation", 240, [
            crop("crops", "moco_v2"),
            crop("crops, moco_v3", "moco_v3"),
            crop("kernels", "moco_v2", "--kernels"),
            crop("kernels, moco_v3", "moco_v3", "--kernels"),
        ]),
        Part("F", "training on real data", 300, [
            training("train", "ffcv_gpu", "ffcv"),
            training("train, resident", "resident", "resident"),
            training("trace", "ffcv_gpu", "ffcv", "--steps", "5", "--runs", "1", "--trace", trace),
        ]),
        Part("G", "NCCL within a CUDA graph", 180, [
            graph("graph of moco_v2", recipe, tiny_v2),
            graph("graph of moco_v3, bn sync", v3, tiny_run),
        ]),
        Part("H", "loaders", 540, [
            Call("resident", "benchmarks.loader", resident, few, _loader),
            rates("ffcv", "ffcv,ffcv-gpu,decode-only", counts),
            rates("dali", "dali", counts, "nvidia.dali"),
            rates("hardware", hardware, str(max(threads)), "nvidia.dali"),
            rates("ffcv's own loader", "ffcv-twice,official", counts, "ffcv"),
        ]),
    ]  # fmt: skip


class Progress:
    """`suite.md`, and the calls' JSON in `suite.json`: continued where they exist, and rewritten after each call."""

    def __init__(self, out: Path) -> None:
        about = machine.describe()
        self._page, self._figures = out / "suite.md", out / "suite.json"
        self._results: dict[str, Any] = json.loads(self._figures.read_text()) if self._figures.exists() else {}
        self._lines = [self._page.read_text()] if self._page.exists() else []
        self._lines += [f"# GPU suite, {about['date']}\n\n{machine.hardware(about)}; {machine.versions(about)}\n"]

    def add(self, text: str, result: dict[str, Any] | None = None, key: str = "") -> None:
        """Add and print text, and add a result by its `key`."""
        section = f"{text}\n"
        print(section, flush=True)
        self._lines.append(section)
        self._page.write_text("\n".join(self._lines))
        if result is not None:
            self._results[key] = result
            write_json(self._figures, self._results)


def run(
    call: Call, out: Path, small: bool, seconds: float, environment: dict[str, str] | None = None
) -> tuple[str, dict[str, Any] | None]:
    """Run a call; return its text in the report, and its result. If it fails, its output goes to `failures.txt`."""
    if missing := [name for name in call.needs if not installed(name)]:
        return f"left out: {', '.join(missing)} cannot be imported", None
    if seconds <= 0:
        return "left out: no time was left", None
    log, result_file = out / "running.txt", out / "running.json"
    line = [sys.executable, "-m", call.module, *call.arguments, *(call.small if small else [])]
    line += ["--json", str(result_file)] if call.report else []
    begin, status = time.perf_counter(), None
    with (
        contextlib.suppress(subprocess.TimeoutExpired),
        logged_session(line, log, cwd=_ROOT, env=environment) as process,
    ):
        status = process.wait(seconds)
    took, output = f"took {time.perf_counter() - begin:.0f} s", log.read_text()
    log.unlink()
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    no_tests = call.module == "pytest" and status == 5
    if status != 0 and not no_tests:
        with (out / "failures.txt").open("a") as file:
            file.write(f"==== {call.name} ====\n{output}\n")
        result_file.unlink(missing_ok=True)
        how = f"failed with status {status}" if status else f"cut off after {seconds:.0f} s"
        return f"{how}: {last}: see failures.txt; {took}", None
    if call.report is None:
        return f"{last}; {took}", None
    result = json.loads(result_file.read_text())
    result_file.unlink()
    return f"{call.report(result).markdown()}\n- {took}", result


def _drawn(cache: Path, large: bool) -> Path:
    """Return a beton of drawn images, of 500 or of 48 pixels a side, written unless it exists."""
    path = cache / f"drawn-{_SIDES[0] if large else 48}.beton"
    if not large and not path.exists():
        prepare("synthetic:1024", path, workers=1, quiet=True)
    if large and not path.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            for index in range(_DRAWN):
                pixels, label = draw(0, index, _SIDES[0])
                file = Path(folder, f"class-{label}", f"{index}-0.jpg")
                file.parent.mkdir(exist_ok=True)
                Image.fromarray(pixels[: _SIDES[1]]).save(file, quality=90)
                for copy in range(1, _COPIES):
                    file.with_name(f"{index}-{copy}.jpg").hardlink_to(file)
            prepare(folder, path, Settings(max_side=_SIDES[0]), quiet=True)
    return path


def _next(args: argparse.Namespace, letters: list[str], done: list[str]) -> str:
    """Return the line that names the command for the part that follows those done, or says that none does."""
    asked = [letter for letter in args.part or letters if letter not in done]
    later = letters[letters.index(done[-1]) + 1 :] if done else letters
    if not (following := [*asked, *later]):
        return "next: nothing, these were the last parts"
    call = ["python", "-m", "benchmarks.gpu_suite", "--part", following[0], "--out", str(args.out)]
    for name in ("data", "cifar", "cache", "threads", "seconds"):
        value = getattr(args, name)
        if value is not None and value != parser().get_default(name):
            call += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return f"next: {shlex.join([*call, *(['--dry-run'] if args.dry_run else [])])}"


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="python -m benchmarks.gpu_suite", description="Run GPU tests and benchmarks.")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--part", action="append", choices=list("ABCDEFGH"), help="part to run; repeatable (default: all)")
    add("--data", type=Path, help="beton of large images (default: drawn ones)")
    add("--cifar", type=Path, help="beton of images of 32 pixels (default: drawn ones)")
    add("--threads", default="1,2,4,8,16", help="loader threads (default %(default)s)")
    add("--seconds", type=float, default=540, help="time limit of all parts (default %(default)s)")
    add("--cache", type=Path, default=_CACHE, help="folder of compiled code and drawn images (default %(default)s)")
    add("--dry-run", action="store_true", help="run each part small, on the CPU if need be")
    return parser


@command
def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running call too
    args = parser().parse_args()
    begin, small = time.perf_counter(), args.dry_run or not torch.cuda.is_available()
    threads = numbers(args.threads, "--threads")
    for name in ("out", "data", "cifar", "cache"):  # parts run in another folder
        setattr(args, name, path.resolve() if (path := getattr(args, name)) else None)
    for folder in (args.out, args.cache):
        folder.mkdir(parents=True, exist_ok=True)
    data = args.data or _drawn(args.cache, large=not small)
    cifar = args.cifar or _drawn(args.cache, large=False)
    for path in (data, cifar):
        Beton(path)  # raises before anything has run
    environment = os.environ | {name: str(args.cache / folder) for name, folder in _CACHED.items()}
    progress = Progress(args.out)
    if small:
        progress.add(f"Parts ran small: {'--dry-run' if args.dry_run else 'there is no GPU'}.")
    suite, done = parts(data, cifar, threads, args.out), list[str]()
    for part in suite:
        left = args.seconds - (time.perf_counter() - begin)
        if (args.part and part.letter not in args.part) or left <= 0:
            continue
        started = time.perf_counter()
        progress.add(f"## {part.letter}: {part.title}")
        for call in part.calls:
            seconds = min(left, part.seconds) - (time.perf_counter() - started)
            text, result = run(call, args.out, small, seconds, environment)
            progress.add(f"### {call.name}\n\n{text}", result, call.name)
        took = time.perf_counter() - started
        limit = min(left, part.seconds)
        progress.add(f"{part.letter} took {took:.0f} s of {limit:.0f}.", {"seconds": took}, f"part {part.letter}")
        done.append(part.letter)
    print(_next(args, [part.letter for part in suite], done))


if __name__ == "__main__":
    main()
