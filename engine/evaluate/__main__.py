"""The command line of `python -m engine.evaluate`."""

import argparse
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from engine.evaluate import features, knn, linear, semi_supervised, svm
from engine.evaluate.detection import detect
from engine.evaluate.segmentation import segment
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import command

_COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "knn": (knn, "weighted k-nearest neighbors, exact"),
    "linear": (linear, "linear classifier: MoCo's protocol, MoCo v3's, or fast"),
    "semi": (semi_supervised, "fine-tuning on a fraction of the labels"),
    "svm": (svm, "linear SVMs on multi-label images"),
    "segment": (segment, "semantic segmentation on images with masks"),
    "detect": (detect, "object detection on images with boxes"),
    "features": (features, "write features to a file"),
}
_RENAMED = {"--share": "--crop-ratio", "--to": "--out"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = ArgumentParser(prog="python -m engine.evaluate", description="Evaluate an encoder.")
    commands = made.add_subparsers(dest="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        description = (module.__doc__ or "").splitlines()[0]
        options: dict[str, Any] = {"help": summary, "description": description, "renamed": _RENAMED}
        options["conflict_handler"] = "resolve"  # features replaces --out
        module.add_arguments(commands.add_parser(name, **options))
    return made


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the evaluation that a command line (`sys.argv` by default) names."""
    args = parser().parse_args(arguments)
    _COMMANDS[args.command][0].run(args)


main = command(run)

if __name__ == "__main__":
    main()
