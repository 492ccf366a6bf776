"""Write a page on one or several runs:  python -m engine.report RUN [RUN ...]"""

import argparse
import logging
from pathlib import Path

import torch

from engine.report.gallery import GalleryOptions
from engine.report.page import report, write
from engine.report.run_folder import read_runs
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, command

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description = "Write a page on one or several runs: curves, numbers, pictures."
    made = ArgumentParser(
        prog="python -m engine.report", description=description, renamed={"--neighbours": "--neighbors"}
    )
    made.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, of any state")
    made.add_argument("--out", type=Path, metavar="FILE.html", help="(default of one run: RUN/report.html)")
    made.add_argument(
        "--data", default="", help="images for the pictures (default: the run's data.eval, or data.train)"
    )
    made.add_argument("--neighbors", type=int, default=8, metavar="N", help="shown for each image (default: 8)")
    made.add_argument("--limit", type=int, default=2000, metavar="N", help="images in the sample (default: 2000)")
    made.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    made.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    made.add_argument("--trust-recipe", action="store_true", help="import the code that a run names as its model.arch")
    pictures = "pictures of views and neighbors; without them the page takes seconds"
    made.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=True, help=pictures)
    made.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=False, help="do not use the GPU")
    return made


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for options that cannot work."""
    if not 1 <= args.neighbors <= 100:
        raise InputError(f"--neighbors {args.neighbors}: choose 1 to 100")
    if not 10 <= args.limit <= 100_000:
        raise InputError(f"--limit {args.limit}: choose 10 to 100000 images")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: choose 0 or more")
    if len(args.runs) > 1 and not args.out:
        raise InputError(f"{len(args.runs)} runs: name their page, --out FILE.html")
    if args.out and args.out.suffix != ".html":
        raise InputError(f"--out {args.out}: name a file that ends in .html")


@command
def main() -> None:
    args = parser().parse_args()
    _check(args)
    runs = read_runs(args.runs)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    shown = (args.data, args.neighbors, args.limit, args.seed, args.which, device)
    options = GalleryOptions(*shown, trust_recipe=args.trust_recipe)
    page = report(runs, options if args.pictures else None)
    out = args.out or runs[0].path / "report.html"
    files = write(page, out)
    for run in runs:
        for problem in run.problems:
            logger.warning("%s: %s", run.name, problem)
    print(f"written: {', '.join(map(str, files[::-1]))}")


if __name__ == "__main__":
    main()
