"""The command line of `python -m engine.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from engine.evaluate import classification, features, knn, linear, semi_supervised, svm
from engine.evaluate.detection import detect
from engine.evaluate.segmentation import segment
from pipeline.backends import BACKENDS
from pipeline.system.errors import command

_COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "knn": (knn, "weighted k-nearest neighbors, exact"),
    "linear": (linear, "a linear classifier: MoCo's protocol, MoCo v3's, or fast"),
    "semi": (semi_supervised, "fine-tuning on part of the labels"),
    "svm": (svm, "linear SVMs on multi-label images"),
    "segment": (segment, "semantic segmentation on images with masks"),
    "detect": (detect, "object detection on images with boxes"),
    "features": (features, "features to a file"),
}
_UNLABELED = ("svm", "features")
_OTHER_DATA = ("segment", "detect")


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the evaluation that a command line (`sys.argv` by default) names."""
    args = _parser().parse_args(arguments)
    module, _ = _COMMANDS[args.command]
    if args.command in _OTHER_DATA:
        module.run(module.setup(args))
    else:
        module.run(classification.setup(args, labeled=args.command not in _UNLABELED))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.evaluate", description="What an encoder is worth.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=(module.__doc__ or "").splitlines()[0])
        _add_common(own)
        if name not in _OTHER_DATA:
            _add_betons(own)
        module.add_arguments(own)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every evaluation takes."""
    parser.add_argument("checkpoint", type=Path, help="run or checkpoint folder, .safetensors, .pth, .pth.tar")
    parser.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    parser.add_argument("--heads", type=int, default=0, help="of a transformer whose file does not say")
    parser.add_argument("--batch", type=int, help="images a step, over all processes")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16", help="of the backbone")
    parser.add_argument("--workers", type=int, default=0, help="loader threads a process (default: its cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--out", type=Path, help="folder of results (default: RUN/evaluation, or FILE.evaluation)")


def _add_betons(parser: argparse.ArgumentParser) -> None:
    """Add what evaluations on betons, and what is read as one, take."""
    parser.add_argument("--train", required=True, metavar="DATA", help="beton, folder or tar, labeled")
    parser.add_argument("--test", metavar="DATA", help="the same (default: every tenth of each class of --train)")
    parser.add_argument("--size", type=int, help="side of the views, pixels (default: the encoder's)")
    parser.add_argument("--share", type=float, help="test crop over the shorter side (default: the run's, or 0.875)")
    parser.add_argument("--backend", choices=["auto", *BACKENDS], default="auto")
    parser.add_argument("--on-bad", choices=["error", "skip"], default="error", help="what a damaged record is")


main = command(run)

if __name__ == "__main__":
    main()
