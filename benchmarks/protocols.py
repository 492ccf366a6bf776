"""Every protocol of `engine.evaluate` on one encoder: what each finds and takes, and how far `fast` is from the full.

    python -m benchmarks.protocols ENCODER --train TRAIN --test TEST --out DIR [--only NAME ...] [--json F]
        [--markdown F] [options of all evaluations, such as --precision no]

ENCODER is what `engine.evaluate` takes. Evaluations run one after another; their own results stay in folders of DIR,
and those that are there already, of the same encoder and data, are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import machine
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


def evaluated(name: str, args: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Return what an evaluation found, as its own result file says it.

    Raises RunFailed where it failed, InputError where what is there already is of another encoder or other data.
    """
    kind, *options = PROTOCOLS[name]
    out = args.out / "".join(c if c.isalnum() else "-" for c in name)
    call = [sys.executable, "-m", "engine.evaluate", kind, args.encoder, *options, "--out", str(out), *more]
    call += ["--train", args.train, "--test", args.test]
    if not list(out.glob("*.json")) and subprocess.run(call).returncode:
        raise RunFailed(f"{name}: the evaluation failed, see above: given again, this command goes on with it")
    (file,) = out.glob("*.json")
    found = json.loads(file.read_text())
    told = [_place(found[key]) for key in ("train", "test")] == [_place(args.train), _place(args.test)]
    of, asked = _place(found["checkpoint"]), _place(args.encoder)
    if not told or asked not in (of, *of.parents):
        raise InputError(
            f"{file}: is of {found['checkpoint']}, {found['train']}, {found['test']}: choose another --out"
        )
    return found


def _place(path: str) -> Path:
    return Path(path).resolve()


def report(result: dict[str, Any]) -> machine.Report:
    """Return the table: scores, and how far each is from the full linear protocols, percent and points."""
    found, full = result["protocols"], [name for name in _FULL if name in result["protocols"]]
    rows = []
    for name, scores in found.items():
        least, most = scores["interval"]
        apart = [f"{100 * (scores['top1'] - found[other]['top1']):+.1f}" for other in full]
        if PROTOCOLS[name][0] != "linear":
            apart = ["" for _ in full]
        row = [name, f"{scores['top1']:.1%}", f"{least:.1%} to {most:.1%}", f"{scores['top5']:.1%}", *apart]
        rows.append([*row, f"{scores['seconds']:.0f}"])
    headings = ["", "top-1", "95 % interval", "top-5", *(f"from {name}" for name in full), "seconds"]
    return machine.Report("Protocols of evaluation beside each other", headings, rows, [result["encoder"]])


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protocols", description="Compare protocols.")
    parser.add_argument("encoder", metavar="ENCODER", help="a run, a checkpoint, or a file of weights")
    parser.add_argument("--train", required=True, metavar="F", help="images to train on, or the bank")
    parser.add_argument("--test", required=True, metavar="F", help="images to classify")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the evaluations' own results")
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="(default: all)")
    machine.add_outputs(parser)
    args, more = parser.parse_known_args()
    about = machine.describe()
    found = {name: evaluated(name, args, more) for name in PROTOCOLS if name in args.only}
    first = next(iter(found.values()))
    if len(of := sorted({scores["checkpoint"] for scores in found.values()})) > 1:
        raise InputError(f"{args.out}: has results of {of[0]} and {of[-1]}: choose another --out")
    images = max(scores["images"] for scores in found.values())  # fine-tuning says how many it was tuned on
    trained = f"{first['architecture']}, {first['checkpoint']}; {images} images of {first['test']}"
    result = {"machine": about, "encoder": trained, "protocols": found}
    machine.tell(report(result), result, args)


if __name__ == "__main__":
    main()
