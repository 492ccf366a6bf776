"""Write a page on one or several runs:  python -m engine.report RUN [RUN ...]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from engine.report.gallery import Wanted
from engine.report.page import report, write
from engine.report.run_folder import read_runs
from pipeline.system.errors import InputError, command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.report", description="Write a page on one or several runs: curves, numbers, pictures."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, of any state")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="(default: RUN/report.html; ./report.html for several)"
    )
    parser.add_argument(
        "--data", default="", help="images for the pictures (default: the run's data.eval, or data.train)"
    )
    parser.add_argument("--neighbors", type=int, default=8, metavar="N", help="shown of each image (default: 8)")
    parser.add_argument("--limit", type=int, default=2000, metavar="N", help="images looked at (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (default: 0)")
    parser.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    parser.add_argument("--no-pictures", action="store_true", help="curves and tables alone, which takes seconds")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    return parser.parse_args()


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work."""
    if not 1 <= args.neighbors <= 100:
        raise InputError(f"--neighbors {args.neighbors}: choose 1 to 100")
    if not 10 <= args.limit <= 100_000:
        raise InputError(f"--limit {args.limit}: choose 10 to 100000 images")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: choose 0 or more")
    if args.out and args.out.suffix != ".html":
        raise InputError(f"--out {args.out}: name a file that ends in .html")


@command
def main() -> None:
    args = _arguments()
    _check(args)
    runs = read_runs(args.runs)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    wanted = Wanted(args.data, args.neighbors, args.limit, args.seed, args.which, device)
    made = report(runs, None if args.no_pictures else wanted)
    to = args.out or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))
    files = write(made, to)
    for run in runs:
        for sentence in run.missing:
            print(f"{run.name}: {sentence}", file=sys.stderr)
    print(f"written: {', '.join(map(str, files[::-1]))}")


if __name__ == "__main__":
    main()
