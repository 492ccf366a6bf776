"""A new user's way through everything, from a fresh clone: what each command takes, and whether it does what it should.

    python -m benchmarks.walk SOURCE --out DIR [--minutes 3.5] [--size 224] [--tests] [--json OUT] [--markdown OUT]

SOURCE is a tar or folder of images, such as ImageNet's. Clones the repository into DIR, and there runs, each as the
README has it: the demonstration, which sets the machine up; the tests, where asked; preparing, verifying and previewing
a beton; training MoCo v2 for two epochs, interrupted in the second by Ctrl-C, and resumed; kNN and a linear classifier
for the demonstration's encoder; features of SOURCE, an export and a report. Output of each goes to `DIR/NAME.log`. Exit
status 1 where a command failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from pipeline.system.errors import InputError, command

_ROOT = Path(__file__).parent.parent
_RUN = "engine/run.py --config engine/recipes/moco_v2_in1k.yaml --data.train walk/train.beton --out walk/run"
_SMALL = "--data.batch 16 --model.arch resnet18 --method.queue 256 --optim.epochs 2 --log_every 1 --save_every 10"


@dataclass(frozen=True)
class Step:
    """A command of the way."""

    name: str
    call: str
    """Of the shell, in the clone."""
    status: int = 0
    """It should end with."""
    until: Callable[[Path], bool] | None = None
    """When, looking at the clone, it gets Ctrl-C; None: never."""


def steps(args: argparse.Namespace) -> list[Step]:
    """Return the commands, in order."""
    found = [Step("demo", f"./millrace demo --out walk/demo --minutes {args.minutes}")]
    found += [Step("test", "./millrace test")] * args.tests
    train = f"python {_RUN} {_SMALL} --data.size {args.size}"
    data = "--train walk/demo/train.beton --test walk/demo/eval.beton"
    return [
        *found,
        Step("prepare", f"python -m pipeline.prepare {shlex.quote(args.source)} walk/train.beton"),
        Step("inspect", "python -m pipeline.inspect walk/train.beton --verify --preview walk/views.png"),
        Step("train, Ctrl-C in the second epoch", f"exec {train}", until=_in_second_epoch),  # a shell would die of it
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
    """Run a command; return what became of it."""
    path = f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    began, log = time.monotonic(), out / f"{step.name.replace(' ', '-').replace(',', '')}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            step.call,
            shell=True,
            cwd=clone,
            env=environment | {"PATH": path},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        asked = False
        try:
            while process.poll() is None:
                if step.until is not None and not asked and step.until(clone):
                    os.killpg(process.pid, signal.SIGINT)
                    asked = True
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    good = process.returncode == step.status and asked == (step.until is not None)
    found = {"name": step.name, "call": step.call, "seconds": time.monotonic() - began, "status": process.returncode}
    print(f"{step.name}: status {process.returncode}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    return found | {"as_expected": good, "log": log.name}


@command
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walk", description="A new user's way, timed.")
    parser.add_argument("source", metavar="SOURCE", help="tar, zip or folder of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the clone and the logs; must be new")
    parser.add_argument("--minutes", type=float, default=3.5, help="of the demonstration (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the views, pixels (default %(default)s)")
    parser.add_argument("--tests", action="store_true", help="run the tests too")
    machine.add_outputs(parser)
    args = parser.parse_args()
    args.source, args.out = str(Path(args.source).resolve()), args.out.resolve()
    if args.out.exists():
        raise InputError(f"--out {args.out}: is there already: choose a new folder")
    args.out.mkdir(parents=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it
    about, clone = machine.describe(), args.out / "millrace"
    subprocess.run(["git", "clone", "--quiet", str(_ROOT), str(clone)], check=True)
    rows = [take(step, clone, args.out) for step in steps(args)]
    demo = clone / "walk" / "demo" / "demo.json"
    result = {"machine": about, "steps": rows, "demo": json.loads(demo.read_text()) if demo.exists() else {}}
    report = machine.Report(
        "A new user's way",
        ["command", "seconds", "status", ""],
        [[r["name"], f"{r['seconds']:.0f}", str(r["status"]), "" if r["as_expected"] else "unexpected"] for r in rows],
        [f"{name}: kNN top-1 {value:.1%}" for name, value in result["demo"].items()],
    )
    machine.tell(report, result, args)
    return int(not all(row["as_expected"] for row in rows))


if __name__ == "__main__":
    main()
