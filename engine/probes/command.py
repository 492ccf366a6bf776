"""The command line of `python -m engine.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

from engine.probes import bench, features, knn, linear, semi, svm
from pipeline.errors import command

_COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "knn": (knn, "weighted k-nearest neighbours, exact"),
    "linear": (linear, "a linear classifier: MoCo's protocol, MoCo v3's, or fast"),
    "semi": (semi, "fine-tuning on part of the labels"),
    "svm": (svm, "linear SVMs on multi-label images"),
    "features": (features, "features to a file"),
}
_UNLABELLED = ("svm", "features")


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the evaluation that a command line (`sys.argv` by default) names."""
    args = _parser().parse_args(arguments)
    module, _ = _COMMANDS[args.command]
    module.run(bench.setup(args, labelled=args.command not in _UNLABELLED))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.evaluate", description="What an encoder is worth.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=(module.__doc__ or "").splitlines()[0])
        bench.add_arguments(own)
        module.add_arguments(own)
    return parser


main = command(run)
