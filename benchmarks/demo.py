"""The demo, seed by seed: kNN top-1 before and after training, and the time it takes.

python -m benchmarks.demo --out DIR [--seeds 0,1,2] [--json F] [--markdown F] [arguments of ./millrace demo]
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser, numbers
from benchmarks.common.table import Report, publish
from pipeline.system.errors import InputError, command


def take(seed: int, out: Path, rest: list[str]) -> dict[str, Any]:
    """Run the demo; return its figures."""
    begin = time.monotonic()
    call = [sys.executable, "-m", "engine.demo", "--out", str(out), "--seed", str(seed), *rest]
    if status := subprocess.run(call, check=False).returncode:
        raise InputError(f"the demo of seed {seed} ended with status {status}: see the lines above")
    seconds = time.monotonic() - begin
    summary = json.loads((out / "run" / "summary.json").read_text())
    top1 = json.loads((out / "demo.json").read_text())
    kept = ("epoch", "training_seconds", "pairs_per_second", "device")
    return {"seed": seed, "top1": top1, "seconds": seconds} | {key: summary[key] for key in kept}


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result."""
    rows, scores = result["rows"], list(result["rows"][0]["top1"])
    headings = ["seed", *(f"{name}, %" for name in scores), "epochs", "pairs/s", "training, s", "in all, s"]
    cells = [
        [str(row["seed"])]
        + [f"{100 * row['top1'][name]:.1f}" for name in scores]
        + [f"{row[key]:.0f}" for key in ("epoch", "pairs_per_second", "training_seconds", "seconds")]
        for row in rows
    ]
    notes = [f"kNN top-1 on held-out images; trained on {rows[0]['device']} ({result['capability']})"]
    return Report("The demo", headings, cells, notes)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("demo", "Run the demo for several seeds.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for all runs")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2 (default %(default)s)")
    return parser


@command
def main() -> None:
    args, rest = parser().parse_known_args()
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists already: choose a new folder")
    about = machine.describe()
    rows = [take(seed, args.out / f"seed-{seed}", rest) for seed in numbers(args.seeds, "--seeds", 0)]
    publish(report, args, machine=about, arguments=rest, rows=rows, capability=torch.backends.cpu.get_cpu_capability())


if __name__ == "__main__":
    main()
