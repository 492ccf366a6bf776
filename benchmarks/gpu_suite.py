"""Every GPU test and GPU benchmark in one command, within a time limit, the most important first.

    python -m benchmarks.gpu_suite --out DIR [--data F.beton] [--cifar F.beton] [--seconds 540] [--dry-run]

Results are written to DIR as they arrive: `suite.md` has each part's outcome, or why it was left out, `suite.json` the
figures, `failures.txt` the output of failed parts. Drawn images replace missing --data and --cifar. With --dry-run, or
without a GPU, each part runs small on the hardware at hand: a check of the suite itself.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import crops, loader, step, train
from benchmarks.common import machine
from benchmarks.common.command_line import numbers
from benchmarks.common.paths import HARDWARE_LOADS
from benchmarks.common.processes import logged_session
from benchmarks.common.table import Report
from pipeline.backends.select_backend import PACE
from pipeline.beton import Beton, manifest_path
from pipeline.prepare import prepare
from pipeline.storage.encode import Settings
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import command
from pipeline.system.files import write_json
from pipeline.system.packages import installed

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """One part of the suite."""

    name: str
    module: str
    arguments: list[str]
    small: list[str]
    """Arguments that reduce it to seconds."""
    report: Callable[[dict[str, Any]], Report] | None
    """Makes the report from its JSON; None: the last line of its output is the report."""
    needs: tuple[str, ...] = ()
    """Packages."""
    seconds: float = 240
    """Time limit, so that later parts get a turn."""


def _loader(result: dict[str, Any]) -> Report:
    """Return the loader's report, with the fewest threads that reach the pace of a GPU."""
    report, rows = loader.report(result), list(result["paths"].values())
    for name in dict.fromkeys(row["name"] for row in rows):
        enough = [row["threads"] for row in rows if row["name"] == name and row["wall"]["median"] >= PACE]
        threads = f"with {min(enough)} threads" if enough else "with none of these numbers of threads"
        report.notes.append(f"{name} reaches {PACE} pairs/s {threads}")
    return report


def parts(data: Path, cifar: Path, threads: list[int]) -> list[Part]:
    """Return the parts, the most important first."""
    counts, hardware = ",".join(map(str, threads)), ",".join(HARDWARE_LOADS)
    recipe = ["--config", str(_ROOT / "engine/recipes/moco_v2_in1k.yaml"), "--data.batch", "256", "--data.eval", ""]
    tiny_run = ["--model.arch", "resnet18", "--model.width", "0.25", "--data.size", "32", "--data.batch", "8"]
    tiny_run += ["--method.queue_size", "64", "--model.bn", "plain", "--no-require-gpu"]
    lightly = ",lightly-amp" if installed("lightly") else ""
    steps = [*recipe, "--compare", f"eager,compiled,graph,official-amp{lightly}", "--model.bn", "plain"]
    trains = [*recipe, "--data.train", str(data), "--compile", "true"]
    big, tiny = ["--data", str(data), "--batch", "512"], ["--batch", "32", "--size", "32", "--runs", "1"]
    resident = ["--data", str(cifar), "--batch", "512", "--size", "32", "--compare", "resident", "--threads", "1"]
    few = [*tiny, "--threads", "1"]

    def rates(name: str, compared: str, threads: str = counts, *needs: str) -> Part:
        arguments = [*big, "--compare", compared, "--threads", threads]
        return Part(name, "benchmarks.loader", arguments, few, _loader, needs)

    small_step = [*tiny_run, "--runs", "1", "--compare", "eager,official-amp"]
    small_train = [*tiny_run, "--steps", "2", "--runs", "1", "--compile", "false"]
    return [
        Part("tests", "pytest", ["-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider"], [], None, ("pytest",)),
        Part("step", "benchmarks.step", steps, small_step, step.report),
        Part("crops", "benchmarks.crops", big, tiny, crops.report),
        Part("train", "benchmarks.train", trains, small_train, train.report),
        Part("train, graph", "benchmarks.train", [*trains, "--cuda_graph", "true"], small_train, train.report),
        Part("resident", "benchmarks.loader", resident, few, _loader),
        rates("dali", "dali", counts, "nvidia.dali"),
        rates("hardware", hardware, str(max(threads)), "nvidia.dali"),
        rates("ffcv", "ffcv,ffcv-gpu,decode-only"),
        rates("peers", "ffcv-twice,official"),
    ]


class Progress:
    """`suite.md`, and the parts' JSON in `suite.json`; both are rewritten after each part."""

    def __init__(self, out: Path) -> None:
        about = machine.describe()
        self._out, self._results = out, dict[str, Any]()
        self._lines = [f"# GPU suite, {about['date']}", ""]
        self._lines += [f"{machine.hardware(about)}; {machine.versions(about)}", ""]

    def add(self, name: str, text: str, result: dict[str, Any] | None = None) -> None:
        """Add a part's section and result, and print the section."""
        section = f"## {name}\n\n{text}\n"
        print(section, flush=True)
        self._lines.append(section)
        (self._out / "suite.md").write_text("\n".join(self._lines))
        if result is not None:
            self._results[name] = result
            write_json(self._out / "suite.json", self._results)


def run(part: Part, out: Path, small: bool, seconds: float) -> tuple[str, dict[str, Any] | None]:
    """Run a part; return its text in the report, and its result. If it fails, its output goes to `failures.txt`."""
    if missing := [name for name in part.needs if not installed(name)]:
        return f"left out: {', '.join(missing)} cannot be imported", None
    if seconds <= 0:
        return "left out: no time was left", None
    log, result_file = out / "running.txt", out / "running.json"
    call = [sys.executable, "-m", part.module, *part.arguments, *(part.small if small else [])]
    call += ["--json", str(result_file)] if part.report else []
    begin, limit, status = time.perf_counter(), min(seconds, part.seconds), None
    with contextlib.suppress(subprocess.TimeoutExpired), logged_session(call, log, cwd=_ROOT) as process:
        status = process.wait(limit)
    took, output = f"took {time.perf_counter() - begin:.0f} s", log.read_text()
    log.unlink()
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    no_tests = part.module == "pytest" and status == 5
    if status != 0 and not no_tests:
        with (out / "failures.txt").open("a") as file:
            file.write(f"==== {part.name} ====\n{output}\n")
        result_file.unlink(missing_ok=True)
        how = f"failed with status {status}" if status else f"cut off after {limit:.0f} s"
        return f"{how}: {last}: see failures.txt; {took}", None
    if part.report is None:
        return f"{last}; {took}", None
    result = json.loads(result_file.read_text())
    result_file.unlink()
    return f"{part.report(result).markdown()}\n- {took}", result


def _drawn(path: Path, count: int, side: int) -> Path:
    """Write a beton of drawn images."""
    if not path.exists():
        prepare(f"synthetic:{count}", path, Settings(max_side=side), quiet=True)
    return path


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="python -m benchmarks.gpu_suite", description="Run all GPU tests and benchmarks.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--data", type=Path, help="beton of large images (default: drawn ones)")
    parser.add_argument("--cifar", type=Path, help="beton of images of 32 pixels (default: drawn ones)")
    parser.add_argument("--threads", default="1,2,4,8,16", help="loader threads (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=540, help="time limit of all parts (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="run each part small, on the CPU if need be")
    return parser


@command
def main() -> None:
    args = parser().parse_args()
    begin, small = time.perf_counter(), args.dry_run or not torch.cuda.is_available()
    threads = numbers(args.threads, "--threads")
    args.out = args.out.resolve()  # parts run in another folder
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = args.out / "drawn.beton"
    data, cifar = (path.resolve() if path else _drawn(drawn, 1024, 48) for path in (args.data, args.cifar))
    for path in (data, cifar):
        Beton(path)  # raises before anything has run
    progress = Progress(args.out)
    if small:
        progress.add("small", f"parts ran small: {'--dry-run' if args.dry_run else 'there is no GPU'}")
    for part in parts(data, cifar, threads):
        progress.add(part.name, *run(part, args.out, small, args.seconds - (time.perf_counter() - begin)))
    if drawn not in (args.data and args.data.resolve(), args.cifar and args.cifar.resolve()):
        for path in (drawn, manifest_path(drawn)):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
