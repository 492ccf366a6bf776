"""Fine-tuning of the entire network on 1 % or 10 % of the labels.

Rates, epochs and milestones are facebookresearch/swav's (`eval_semisup.py` and its README): SGD of momentum 0.9 without
decay, a batch of 256, 20 epochs, times 0.2 after 12 and 16; rates of backbone and classifier 0.02 and 5 for 1 %, 0.01
and 0.2 for 10 %, proportional to the batch. BatchNorm is trained, synchronized over all ranks.
"""

import argparse
import math
import re
from collections import OrderedDict
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import nn

from engine.evaluate import classification
from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.resume import EpochCheckpoint
from engine.evaluate.trainer import Head, check_batch, sgd, train_classifier
from engine.parallel.sync_batchnorm import synchronize
from methods.encoders import place
from pipeline.beton import Beton
from pipeline.storage.subset import Subset
from pipeline.system.errors import InputError, printable
from pipeline.system.limits import LIST_BYTES, read_text
from pipeline.system.text import counted

logger = get_logger(__name__)

_RATES = {0.01: (0.02, 5.0), 0.1: (0.01, 0.2)}  # learning rates of backbone and classifier, by fraction of the labels
_MILESTONES, _FACTOR = (0.6, 0.8), 0.2
_MIN_STEPS = 200  # ImageNet has 1000 with 1 % of its labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of fine-tuning."""
    classification.add_arguments(parser)
    parser.add_argument("--labels", type=float, default=0.01, help="fraction of each class (default: 0.01)")
    parser.add_argument("--names", type=Path, help="instead: file of image names, one a line, such as SimCLR's")
    parser.add_argument("--epochs", type=int, default=20, help="(default: 20)")
    parser.add_argument(
        "--lr", type=float, help="learning rate of the backbone, for a batch of 256 (default: by --labels)"
    )
    parser.add_argument("--lr-head", type=float, help="learning rate of the classifier (default: by --labels)")


def run(args: argparse.Namespace) -> None:
    """Fine-tune on a fraction of the labels, and score on the test images."""
    evaluation = classification.build(args)
    if args.epochs < 1:
        raise InputError(f"--epochs {args.epochs}: choose 1 or more")
    train = evaluation.train
    chosen = find_named(train, args.names) if args.names else draw_balanced(train.labels, args.labels, args.seed)
    part, fraction = Subset(train, chosen), len(chosen) / len(train)
    published = _RATES[min(_RATES, key=lambda known: abs(math.log(known / fraction)))]
    lr, lr_head = args.lr or published[0], args.lr_head or published[1]
    batch = check_batch(args.batch or 256, len(part))
    settings = evaluation.settings(images=len(part), part=part.fingerprint, epochs=args.epochs, batch=batch, lr=lr)
    settings |= {"lr_head": lr_head}
    logger.info("%d of %d labels (%.2f %%), batches of %d", len(part), len(train), 100 * fraction, batch)
    steps = args.epochs * (len(part) // batch)
    if steps < _MIN_STEPS:
        logger.warning("%d steps are too few to learn from: choose a smaller --batch or more --epochs", steps)
    name = f"semi_{args.names.stem}" if args.names else f"semi_{args.labels:g}"
    model = tune(evaluation, part, batch, (lr, lr_head), name, settings)
    model.eval()

    def classify(images: torch.Tensor) -> torch.Tensor:
        with evaluation.accelerator.autocast():
            return model(images)

    scores = evaluation.score(classify, frozen=False)
    title = f"fine-tuned on {fraction:.3g} of the labels, {counted(args.epochs, 'epoch')}"
    evaluation.write(name, title, scores, settings, images=len(part))


def tune(
    evaluation: ClassificationEvaluation,
    part: Beton,
    batch: int,
    peaks: tuple[float, float],
    name: str,
    settings: dict[str, object],
) -> nn.Module:
    """Return the fine-tuned network. Resumes an interrupted training.

    peaks: learning rates of backbone and classifier, for a batch of 256.
    """
    evaluation.backbone.requires_grad_(True)
    head = Head(evaluation.backbone.features, evaluation.classes, evaluation.args.seed)
    model = nn.Sequential(OrderedDict(backbone=evaluation.backbone, head=head))
    place(synchronize(model), evaluation.device)
    optimizer = sgd([{"params": list(module.parameters())} for module in model])
    checkpoint, epochs = EpochCheckpoint(evaluation, name, model, optimizer, settings), evaluation.args.epochs

    def rates(epoch: int) -> list[float]:
        factor = batch / 256 * _FACTOR ** sum(epoch / epochs >= milestone for milestone in _MILESTONES)
        return [peak * factor for peak in peaks]

    train_classifier(checkpoint, model, part, batch, epochs, rates, remedy="--lr or --lr-head")
    return model


def draw_balanced(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return samples drawn by `seed`, int64, sorted: that fraction of each class, rounded, and at least one.

    Raises InputError for a fraction that is not above 0, up to 1.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"--labels {fraction:g}: choose a fraction above 0, up to 1, such as 0.01")
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members)))
        chosen.append(np.random.default_rng((seed, int(label))).permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def find_named(beton: Beton, file: Path) -> np.ndarray:
    """Return the samples whose names are in a file, int64, sorted. Names may leave out folders.

    Raises InputError if the file cannot be read, is empty, or names an image that is not in the beton.
    """
    lines = read_text(file, LIST_BYTES, "give --names a text file of one name a line", "surrogateescape").splitlines()
    names = [printable(line.strip()) for line in lines if line.strip()]
    samples: dict[str, int] = {}
    for index in range(len(beton)):
        name = beton.name(index)
        if re.fullmatch(r"number \d+", name):
            raise InputError(f"{beton.path}: has no manifest, so no names: prepare it, or give --labels")
        samples[name] = samples[PurePosixPath(name).name] = index
    keys = [name if name in samples else PurePosixPath(name).name for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key not in samples]
    if not names:
        raise InputError(f"--names {file}: names no image: give one name a line, such as {beton.name(0)}")
    if missing:
        problem = f"{missing[0]} and {len(missing) - 1} others are not in {beton.path}"
        raise InputError(f"--names {file}: {problem}: give names such as {beton.name(0)}")
    return np.unique(np.array([samples[key] for key in keys], np.int64))
