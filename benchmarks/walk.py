"""The way of a new user through every command, from a fresh clone: times, and whether each behaves as expected.

    python -m benchmarks.walk SOURCE --out DIR [--minutes 3.5] [--size 224] [--tests] [--json OUT] [--markdown OUT]

SOURCE is a tar or folder of images, such as ImageNet's. Clones the repository into DIR and runs there: the demo, which
sets up the machine; the tests, with --tests; preparing, verifying and previewing a beton; training MoCo v2 for two
epochs, interrupted by Ctrl-C in the second and resumed; kNN and a linear classifier on the demo's encoder; features of
SOURCE, an export and a report. Output goes to `DIR/NAME.log`. Exit status 1 if a command did not behave as expected.
"""

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser
from benchmarks.common.processes import logged_session
from benchmarks.common.table import Report, publish
from pipeline.system.errors import InputError, command

logger = logging.getLogger(__name__)
_ROOT = Path(__file__).parent.parent
_RUN = "engine/run.py --config engine/recipes/moco_v2_in1k.yaml --data.train walk/train.beton --out walk/run"
_SMALL = "--data.batch 16 --model.arch resnet18 --method.queue-size 256 --optim.epochs 2 --log-every 1 --save-every 10"


@dataclass(frozen=True)
class Step:
    """A command of the way."""

    name: str
    call: str
    """Shell command, run in the clone."""
    status: int = 0
    """Expected exit status."""
    interrupt: Callable[[Path], bool] | None = None
    """Whether to send Ctrl-C now, given the clone; None: never."""


def steps(args: argparse.Namespace) -> list[Step]:
    """Return the commands, in order."""
    train = f"python {_RUN} {_SMALL} --no-require-gpu --data.size {args.size}"
    data = "--train walk/demo/train.beton --test walk/demo/eval.beton"
    return [
        Step("demo", f"./millrace demo --out walk/demo --minutes {args.minutes}"),
        *[Step("test", "./millrace test")] * args.tests,
        Step("prepare", f"python -m pipeline.prepare {shlex.quote(args.source)} walk/train.beton"),
        Step("inspect", "python -m pipeline.inspect walk/train.beton --verify --preview walk/views.png"),
        Step("train, Ctrl-C in the second epoch", f"exec {train}", interrupt=_in_second_epoch),  # not a shell
        Step("resume to the end", f"{train} --resume auto"),
        Step("kNN of the demo's encoder", f"python -m engine.evaluate knn walk/demo/run {data}"),
        Step("linear, fast", f"python -m engine.evaluate linear walk/demo/run {data} --protocol fast"),
        Step(
            "features", "python -m engine.evaluate features walk/run --train walk/train.beton --out walk/features.npy"
        ),
        Step("export", "python -m engine.export walk/run --format torchvision --out walk/resnet18.pth"),
        Step(
            "report",
            "python -m engine.report walk/run walk/demo/run --data walk/demo/eval.beton --out walk/report.html",
        ),
    ]


def _in_second_epoch(clone: Path) -> bool:
    lines = clone / "walk" / "run" / "metrics.jsonl"
    try:
        return json.loads(lines.read_text().splitlines()[-1])["epoch"] > 1
    except (OSError, IndexError, ValueError):
        return False


def take(step: Step, clone: Path, out: Path) -> dict[str, Any]:
    """Run a command; return its time and status, and whether it behaved as expected."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
    begin, log = time.monotonic(), out / f"{step.name.replace(' ', '-').replace(',', '')}.log"
    interrupted = False
    with logged_session(step.call, log, shell=True, cwd=clone, env=environment) as process:
        while process.poll() is None:
            if step.interrupt is not None and not interrupted and step.interrupt(clone):
                os.killpg(process.pid, signal.SIGINT)
                interrupted = True
            time.sleep(0.1)
    status, seconds = process.returncode, time.monotonic() - begin
    as_expected = status == step.status and interrupted == (step.interrupt is not None)
    logger.info(f"{step.name}: status {status}, {seconds:.0f} s")
    row = {"name": step.name, "call": step.call, "seconds": seconds, "status": status}
    return row | {"as_expected": as_expected, "log": log.name}


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows = [
        [row["name"], f"{row['seconds']:.0f}", str(row["status"]), "" if row["as_expected"] else "unexpected"]
        for row in result["steps"]
    ]
    notes = [f"{name}: kNN top-1 {value:.1%}" for name, value in result["demo"].items()]
    return Report("The way of a new user", ["command", "seconds", "status", ""], rows, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("walk", "Time every command on the way of a new user.", {"--to": "--out"})
    parser.add_argument("source", metavar="SOURCE", help="tar, zip or folder of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the clone and the logs")
    parser.add_argument("--minutes", type=float, default=3.5, help="minutes of the demo (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the views, pixels (default %(default)s)")
    parser.add_argument("--tests", action="store_true", help="run the tests too")
    return parser


@command
def main() -> int:
    args = parser().parse_args()
    args.source, args.out = str(Path(args.source).resolve()), args.out.resolve()
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists already: choose a new folder")
    args.out.mkdir(parents=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
    about, clone = machine.describe(), args.out / "millrace"
    subprocess.run(["git", "clone", "--quiet", str(_ROOT), str(clone)], check=True)
    rows = [take(step, clone, args.out) for step in steps(args)]
    demo = clone / "walk" / "demo" / "demo.json"
    top1 = json.loads(demo.read_text()) if demo.exists() else {}
    publish(report, args, machine=about, steps=rows, demo=top1)
    return int(not all(row["as_expected"] for row in rows))


if __name__ == "__main__":
    main()
