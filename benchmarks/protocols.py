"""Every protocol of `engine.evaluate` on one encoder: scores, times, and how far `fast` is from the full protocols.

    python -m benchmarks.protocols ENCODER --train TRAIN --test TEST --out DIR [--only NAME ...] [--json F]
        [--markdown F] [options of all evaluations, such as --precision no]

ENCODER is a run, a checkpoint or a file of weights, as for `engine.evaluate`. Evaluations run one after another. Their
own results stay in folders of DIR, and are used again for the same encoder and data.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.command_line import ArgumentParser, benchmark_parser
from benchmarks.common.table import Report, publish
from pipeline.system.errors import InputError, RunFailed, command

PROTOCOLS = {
    "kNN": ["knn"],
    "fast, center crops": ["linear", "--protocol", "fast", "--passes", "0"],
    "fast, 1 pass": ["linear", "--protocol", "fast", "--passes", "1"],
    "fast, 4 passes": ["linear", "--protocol", "fast", "--passes", "4"],
    "moco": ["linear", "--protocol", "moco"],
    "moco_v3": ["linear", "--protocol", "moco_v3"],
    "semi, 1 %": ["semi", "--labels", "0.01"],
    "semi, 10 %": ["semi", "--labels", "0.1"],
}
"""Arguments of `engine.evaluate`, by name."""
_FULL = ("moco", "moco_v3")


def evaluate(name: str, args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Run one evaluation, unless its result is there; return the result.

    Raises RunFailed if it fails, InputError if the result is of another encoder or other data.
    """
    kind, *options = PROTOCOLS[name]
    out = args.out / "".join(c if c.isalnum() else "-" for c in name)
    call = [sys.executable, "-m", "engine.evaluate", kind, args.encoder, *options, "--out", str(out), *rest]
    call += ["--train", args.train, "--test", args.test]
    if not list(out.glob("*.json")) and subprocess.run(call).returncode:
        raise RunFailed(f"{name}: the evaluation failed, see above: the same command continues there")
    (file,) = out.glob("*.json")
    result = json.loads(file.read_text())
    same_data = all(_resolved(result[key]) == _resolved(getattr(args, key)) for key in ("train", "test"))
    checkpoint, encoder = _resolved(result["checkpoint"]), _resolved(args.encoder)
    if not same_data or encoder not in (checkpoint, *checkpoint.parents):
        raise InputError(
            f"{file}: is of {result['checkpoint']}, {result['train']}, {result['test']}: choose another --out"
        )
    return result


def _resolved(path: str) -> Path:
    return Path(path).resolve()


def report(result: dict[str, Any]) -> Report:
    """Return the table: scores, and each linear protocol's distance from the full ones, in points."""
    results, full = result["protocols"], [name for name in _FULL if name in result["protocols"]]
    rows = []
    for name, scores in results.items():
        low, high = scores["interval"]
        linear = PROTOCOLS[name][0] == "linear"
        distances = [f"{100 * (scores['top1'] - results[other]['top1']):+.1f}" if linear else "" for other in full]
        row = [name, f"{scores['top1']:.1%}", f"{low:.1%} to {high:.1%}", f"{scores['top5']:.1%}", *distances]
        rows.append([*row, f"{scores['seconds']:.0f}"])
    headings = ["", "top-1", "95 % interval", "top-5", *(f"from {name}" for name in full), "seconds"]
    return Report("Evaluation protocols compared", headings, rows, [result["encoder"]])


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = benchmark_parser("protocols", "Compare evaluation protocols.")
    parser.add_argument("encoder", metavar="ENCODER", help="a run, a checkpoint, or a file of weights")
    parser.add_argument("--train", required=True, metavar="F", help="images to train on, or the kNN bank")
    parser.add_argument("--test", required=True, metavar="F", help="images to classify")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the evaluations' results")
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="(default: all)")
    return parser


@command
def main() -> None:
    args, rest = parser().parse_known_args()
    about = machine.describe()
    results = {name: evaluate(name, args, rest) for name in PROTOCOLS if name in args.only}
    checkpoints = sorted({scores["checkpoint"] for scores in results.values()})
    if len(checkpoints) > 1:
        raise InputError(f"{args.out}: has results of {checkpoints[0]} and {checkpoints[-1]}: choose another --out")
    images = max(scores["images"] for scores in results.values())  # fine-tuning counts the images it was tuned on
    first = next(iter(results.values()))
    encoder = f"{first['architecture']}, {first['checkpoint']}; {images} images of {first['test']}"
    publish(report, args, machine=about, encoder=encoder, protocols=results)


if __name__ == "__main__":
    main()
