"""Semantic segmentation: a fully convolutional network on the encoder, tuned or frozen; mean intersection over union.

As MoCo's on PASCAL VOC (1911.05722, appendix A.5; the network is in `fcn.py`): crops of 513 pixels, scaled by 0.5 to 2
and flipped, 30,000 iterations of 16, rate 0.003, times 0.1 after 70 and 90 % of them, decay 0.0001, the whole network
tuned, tested at the images' own size; the paper's figures are means of five runs. Ours: scales are drawn uniformly,
BatchNorm is synchronized over processes, the rate grows with the batch, and `--frozen` trains the head alone.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from engine.evaluate.evaluation import Trial, share_of, start
from engine.evaluate.segmentation.fcn import Fcn
from engine.evaluate.segmentation.miou import count, overlap
from engine.evaluate.trainer import Kept, check_batch, sgd, train_by_steps
from engine.parallel import collectives
from engine.parallel.consensus import all_gather_object
from engine.parallel.sync_batchnorm import synchronize
from methods.encoders import place
from pipeline.augment.color import normalize
from pipeline.dense.masks import IGNORED, Masked, classes_in, is_voc, open_masked
from pipeline.dense.scale_crops import SCALES, ScaleCrops
from pipeline.dense.voc_boxes import CLASSES
from pipeline.system.device import to_device
from pipeline.system.errors import InputError
from pipeline.system.thread_pool import Workers

BATCH = 16
_STEPS, _FACTOR = (0.7, 0.9), 0.1
_DECAY = 1e-4
_TESTED = 8  # images at once, at most, of equal sizes


@dataclass
class Segmentation(Trial):
    """An encoder and the images with masks that it is tried on."""

    train: Masked
    test: Masked

    def check(self) -> None:
        """Raise InputError for options that cannot work."""
        for name in ("iterations", "lr", "classes"):
            value = getattr(self.args, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: choose a number above 0")
        if not 32 <= self.args.size <= 4096:
            raise InputError(f"--size {self.args.size}: choose 32 to 4096 pixels")
        if self.args.classes and self.args.classes > IGNORED:
            raise InputError(f"--classes {self.args.classes}: choose {IGNORED} at most: masks are 8-bit")
        super().check()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of segmentation."""
    parser.add_argument("--train", type=Path, required=True, metavar="FOLDER", help="VOC2012, or images/ and masks/")
    parser.add_argument("--test", type=Path, metavar="FOLDER", help="(default: --test-set, or every tenth, of --train)")
    parser.add_argument("--size", type=int, default=513, help="side of the crops, pixels (default: %(default)s)")
    parser.add_argument("--frozen", action="store_true", help="train the head alone")
    parser.add_argument("--iterations", type=int, default=30000, help="steps in all (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.003, help=f"for a batch of {BATCH} (default: %(default)s)")
    parser.add_argument("--classes", type=int, help="their number, background counted (default: as in the masks)")
    parser.add_argument("--train-set", default="train", help="VOC's ImageSets/Segmentation/SET.txt (default: train)")
    parser.add_argument("--test-set", default="val", help="the same (default: val)")
    parser.add_argument("--masks", default="SegmentationClass", metavar="FOLDER", help="VOC's (default: %(default)s)")


def setup(args: argparse.Namespace) -> Segmentation:
    """Return the trial of a command line. Raises InputError, on all processes, for what cannot work."""
    return start(Segmentation, args, lambda: _open(args))


def _open(args: argparse.Namespace) -> tuple[Masked, Masked]:
    """Return the two data sets; of one folder of VOC's layout two sets, of another every tenth image is the second."""
    train = open_masked(args.train, args.train_set, args.masks)
    if args.test is None and not is_voc(args.train):
        return train.held_out()
    return train, open_masked(args.test or args.train, args.test_set, args.masks)


def run(trial: Segmentation) -> None:
    """Train a segmentation, and score it on the test images."""
    args = trial.args
    batch = check_batch(args.batch or BATCH, len(trial.train))
    names = _classes(trial)
    settings = trial.settings(size=args.size, batch=batch, iterations=args.iterations, lr=args.lr, frozen=args.frozen)
    settings |= {"classes": len(names)}
    trial.say(f"{len(trial.train)} images for training, {len(trial.test)} for testing, {len(names)} classes")
    if SCALES[1] * trial.train.shapes.max() < args.size:
        trial.say(f"warning: crops of {args.size} pixels are larger than any image at twice its size: give --size")
    name = "segment_frozen" if args.frozen else "segment"
    model, seconds = train(trial, len(names), batch, name, settings)
    counts = tested(trial, model, len(names))
    if args.frozen:
        trial.check_frozen()
    scores = overlap(counts, names, args.seed)
    what = f"segmentation, {'frozen' if args.frozen else 'tuned'}, {args.iterations} iterations"
    result = {**scores.as_dict(), "training_seconds": round(seconds, 2), "settings": settings}
    trial.write(name, result, what, f"{100 * scores.miou:.2f}", scores)


def _classes(trial: Segmentation) -> list[str]:
    """Return the classes' names, after decoding every mask. Raises InputError for one that cannot be right."""
    wanted, workers = trial.args.classes or 0, Workers(trial.workers, lambda: None)
    try:
        in_train, in_test = (_numbers(data, wanted, workers) for data in (trial.train, trial.test))
    finally:
        workers.close()
    if len(in_train) < 2 or not in_test:
        found = f"{len(in_train)} classes in masks for training, {len(in_test)} in those for testing"
        raise InputError(f"{trial.train.path}: {found}: there is nothing to tell apart: give other masks")
    number = wanted or max(in_train | in_test) + 1
    if in_test - in_train:
        trial.say(f"warning: classes of the test masks that no training mask has: {sorted(in_test - in_train)}")
    voc = ["background", *CLASSES]
    return voc if number == len(voc) and is_voc(trial.train.path) else [str(one) for one in range(number)]


def _numbers(data: Masked, classes: int, workers: Workers) -> set[int]:
    """Return the class numbers in all masks, of which each process reads its share."""
    return set().union(*all_gather_object(lambda: sorted(classes_in(data, share_of(data), classes, workers))))


def train(trial: Segmentation, classes: int, batch: int, name: str, settings: dict[str, object]) -> tuple[Fcn, float]:
    """Return the network and the seconds its training took; an attempt that was broken off is gone on from."""
    args = trial.args
    model = Fcn(trial.backbone, classes, frozen=args.frozen, seed=args.seed)
    own = model.head if args.frozen else model
    if trial.accelerator.num_processes > 1:
        synchronize(own, trial.device)
    place(model, trial.device)
    optimizer = sgd([{"params": list(own.parameters())}], weight_decay=_DECAY)
    crops = ScaleCrops(trial.train, size=args.size, batch=batch, seed=args.seed, **trial.sharing)
    try:
        seconds = train_by_steps(
            trial,
            Kept(trial, name, own, optimizer, settings),
            model,
            optimizer,
            lambda first, last: crops.crops(first, last, trial.device),
            lambda wrapped, one: pixel_loss(wrapped(one[0]), one[1]),
            lambda step: rate(args.lr * batch / BATCH, step / args.iterations),
            epoch=crops.steps,
            iterations=args.iterations,
        )
    finally:
        crops.close()
    return model, seconds


def rate(highest: float, done: float) -> float:
    """Return the learning rate once that share of the iterations is done."""
    return highest * _FACTOR ** sum(done >= at for at in _STEPS)


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of a process's pixels that have a class, over their mean number on all processes.

    So the mean of all processes' gradients is that of the global batch. logits [B, C, H, W], masks int64 [B, H, W].
    """
    known = collectives.mean((masks != IGNORED).sum().float())
    return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / known.clamp(min=1)


@torch.no_grad()
def tested(trial: Segmentation, model: Fcn, classes: int) -> np.ndarray:
    """Return the counts of all test images, each at its own size: int64 [N, 3, C], as `iou.count` has them."""
    own, data = share_of(trial.test), trial.test
    model.eval()
    batches = alike(data.shapes, own)
    counts = torch.zeros(len(own), 3, classes, dtype=torch.int64, device=trial.device)
    workers = Workers(trial.workers, lambda: None)
    found = workers.in_order(lambda _, index: data.read(index), np.concatenate(batches).tolist(), ahead=2 * _TESTED)
    try:
        for batch in trial.shown(batches, "batches"):
            images, masks = zip(*islice(found, len(batch)), strict=True)
            pixels, known = (to_device(np.stack([*map(np.asarray, some)]), trial.device) for some in (images, masks))
            with trial.accelerator.autocast():
                predicted = model(normalize(pixels)).argmax(dim=1)
            counts[batch - own[0]] = count(predicted, known.long(), classes)
    finally:
        workers.close()
    return trial.everywhere(counts, data).cpu().numpy()


def alike(shapes: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
    """Return the indices in batches of images of equal height and width (shapes int64 [N, 2])."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index in indices.tolist():
        by_shape.setdefault(tuple(shapes[index].tolist()), []).append(index)
    groups = [np.array(group) for group in by_shape.values()]
    return [group[at : at + _TESTED] for group in groups for at in range(0, len(group), _TESTED)]
