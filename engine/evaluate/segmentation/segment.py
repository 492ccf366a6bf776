"""Semantic segmentation: a fully convolutional network on the encoder, tuned or frozen; mean intersection over union.

MoCo's protocol on PASCAL VOC (1911.05722, appendix A.5; the network is in `fcn.py`): crops of 513 pixels, scaled by 0.5
to 2 and flipped, 30,000 iterations of 16, rate 0.003, times 0.1 after 70 and 90 % of them, decay 0.0001, the entire
network tuned, tested at the images' own size; the paper's results are means of five runs. Ours: scales are drawn
uniformly, BatchNorm is synchronized over ranks, the rate is proportional to the batch, and `--frozen` trains the head
alone.
"""

import argparse
import contextlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from torch.nn import functional as F

from engine.evaluate import evaluation, trainer
from engine.evaluate.evaluation import Evaluation, shard
from engine.evaluate.resume import EpochCheckpoint
from engine.evaluate.segmentation.fcn import Fcn
from engine.evaluate.segmentation.miou import count_pixels, score
from engine.evaluate.trainer import check_batch, sgd
from engine.parallel import collectives
from engine.parallel.consensus import all_gather_object
from engine.parallel.sync_batchnorm import synchronize
from methods.encoders import ResNet, place
from methods.vit import VisionTransformer
from pipeline.augment.color import normalize
from pipeline.dense.masks import IGNORED, Masked, classes_in, is_voc, open_masked
from pipeline.dense.scale_crops import SCALES, ScaleCrops
from pipeline.dense.voc_boxes import CLASSES
from pipeline.system.device import to_device
from pipeline.system.errors import InputError
from pipeline.system.thread_pool import Workers

logger = get_logger(__name__)

BATCH = 16
_MILESTONES, _FACTOR = (0.7, 0.9), 0.1
_DECAY = 1e-4
_TEST_BATCH = 8  # images of equal size, at most


@dataclass
class Segmentation(Evaluation):
    """An encoder, and images with masks as training and test set."""

    train: Masked
    test: Masked

    def check(self) -> None:
        """Create the folder of results. Raises InputError for it or for other options that cannot work."""
        if self.encoder.architecture.custom:
            raise InputError(
                f"{self.encoder.architecture}: needs the maps of a ResNet or transformer of ours: give one"
            )
        self.require_positive("iterations", "lr", "classes")
        if not 32 <= self.args.size <= 4096:
            raise InputError(f"--size {self.args.size}: choose 32 to 4096 pixels")
        if self.args.classes and self.args.classes > IGNORED:
            raise InputError(f"--classes {self.args.classes}: choose {IGNORED} at most: masks are 8-bit")
        super().check()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of segmentation."""
    evaluation.add_arguments(parser)
    parser.add_argument("--train", type=Path, required=True, metavar="FOLDER", help="VOC2012, or images/ and masks/")
    parser.add_argument("--test", type=Path, metavar="FOLDER", help="(default: --test-set, or every tenth, of --train)")
    parser.add_argument("--size", type=int, default=513, help="side of the crops, pixels (default: %(default)s)")
    parser.add_argument("--frozen", action=argparse.BooleanOptionalAction, default=False, help="train the head alone")
    parser.add_argument("--iterations", type=int, default=30000, help="steps in all (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.003, help=f"for a batch of {BATCH} (default: %(default)s)")
    parser.add_argument("--classes", type=int, help="their number, background included (default: as in the masks)")
    parser.add_argument("--train-set", default="train", help="VOC's ImageSets/Segmentation/SET.txt (default: train)")
    parser.add_argument("--test-set", default="val", help="the same (default: val)")
    parser.add_argument("--masks", default="SegmentationClass", metavar="FOLDER", help="VOC's (default: %(default)s)")


def _open(args: argparse.Namespace) -> tuple[Masked, Masked]:
    """Return training and test set. Of a single folder that is not VOC's, every tenth image is the test set."""
    train = open_masked(args.train, args.train_set, args.masks)
    if args.test is None and not is_voc(args.train):
        return train.held_out()
    return train, open_masked(args.test or args.train, args.test_set, args.masks)


def run(args: argparse.Namespace) -> None:
    """Train a segmentation, and score it on the test images."""
    task = evaluation.build(Segmentation, args, lambda: _open(args))
    batch = check_batch(args.batch or BATCH, len(task.train))
    names = _class_names(task)
    settings = task.settings(size=args.size, batch=batch, iterations=args.iterations, lr=args.lr, frozen=args.frozen)
    settings |= {"classes": len(names)}
    logger.info("%d training images, %d test images, %d classes", len(task.train), len(task.test), len(names))
    if SCALES[1] * task.train.shapes.max() < args.size:
        logger.warning("crops of %d pixels are larger than any image at twice its size: give --size", args.size)
    name = "segment_frozen" if args.frozen else "segment"
    model = train(task, len(names), batch, name, settings)
    counts = count_test_pixels(task, model, len(names))
    if args.frozen:
        task.check_frozen()
    scores = score(counts, names, args.seed)
    title = f"segmentation, {'frozen' if args.frozen else 'tuned'}, {args.iterations} iterations"
    task.write(name, title, scores, settings)


def _class_names(task: Segmentation) -> list[str]:
    """Return the classes' names, after decoding every mask. Raises InputError for an impossible mask."""
    limit = task.args.classes or 0
    with contextlib.closing(Workers(task.workers, lambda: None)) as workers:
        in_train, in_test = (_class_numbers(data, limit, workers) for data in (task.train, task.test))
    if len(in_train) < 2 or not in_test:
        counts = f"{len(in_train)} classes in the training masks, {len(in_test)} in the test masks"
        raise InputError(f"{task.train.path}: {counts}, at least 2 and 1 are needed: give other masks")
    number = limit or max(in_train | in_test) + 1
    if in_test - in_train:
        logger.warning("classes of the test masks that no training mask has: %s", sorted(in_test - in_train))
    voc = ["background", *CLASSES]
    return voc if number == len(voc) and is_voc(task.train.path) else [str(one) for one in range(number)]


def _class_numbers(data: Masked, limit: int, workers: Workers) -> set[int]:
    """Return the class numbers in all masks. Each rank reads its shard."""
    return set().union(*all_gather_object(lambda: sorted(classes_in(data, shard(data), limit, workers))))


def train(task: Segmentation, classes: int, batch: int, name: str, settings: dict[str, object]) -> Fcn:
    """Return the trained network. Resumes an interrupted training."""
    args = task.args
    assert isinstance(task.backbone, ResNet | VisionTransformer)
    model = Fcn(task.backbone, classes, frozen=args.frozen, seed=args.seed)
    trained = synchronize(model.head if args.frozen else model)
    place(model, task.device)
    optimizer = sgd([{"params": list(trained.parameters())}], weight_decay=_DECAY)
    checkpoint = EpochCheckpoint(task, name, trained, optimizer, settings)
    options = {"statistics": task.encoder.statistics, "seed": args.seed, **task.sharding}
    crops = ScaleCrops(task.train, size=args.size, batch=batch, **options)
    with contextlib.closing(crops):
        trainer.train(
            checkpoint,
            model,
            lambda epoch: crops.crops(epoch * crops.steps, args.iterations, task.device),
            lambda wrapped, crop: pixel_loss(wrapped(crop[0]), crop[1]),
            lambda step: [rate(args.lr * batch / BATCH, step / args.iterations)],
            epoch_steps=crops.steps,
            steps=args.iterations,
        )
    return model


def rate(peak: float, done: float) -> float:
    """Return the learning rate after that fraction of the iterations."""
    return peak * _FACTOR ** sum(done >= milestone for milestone in _MILESTONES)


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of this rank's labeled pixels over the mean number of them on all ranks.

    The mean of all ranks' gradients is then that of the global batch. logits [B, C, H, W], masks int64 [B, H, W].
    """
    known = collectives.mean((masks != IGNORED).sum().float())
    return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / known.clamp(min=1)


@torch.no_grad()
def count_test_pixels(task: Segmentation, model: Fcn, classes: int) -> np.ndarray:
    """Return the `count_pixels` of all test images, each at its own size: int64 [N, 3, C]."""
    local, data = shard(task.test), task.test
    model.eval()
    batches = group_by_shape(data.shapes, local)
    counts = torch.zeros(len(local), 3, classes, dtype=torch.int64, device=task.device)
    order = np.concatenate(batches).tolist()
    with contextlib.closing(Workers(task.workers, lambda: None)) as workers:
        pairs = workers.in_order(lambda _, index: data.read(index), order, ahead=2 * _TEST_BATCH)
        for batch in task.progress(batches, "batches"):
            images, masks = zip(*islice(pairs, len(batch)), strict=True)
            pixels, labels = (to_device(np.stack([*map(np.asarray, some)]), task.device) for some in (images, masks))
            with task.accelerator.autocast():
                predicted = model(normalize(pixels, task.encoder.statistics)).argmax(dim=1)
            counts[batch - local[0]] = count_pixels(predicted, labels.long(), classes)
    return task.gather(counts, data).cpu().numpy()


def group_by_shape(shapes: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
    """Return the indices in batches of images of equal height and width (shapes int64 [N, 2])."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index in indices.tolist():
        by_shape.setdefault(tuple(shapes[index].tolist()), []).append(index)
    groups = [np.array(group) for group in by_shape.values()]
    return [group[at : at + _TEST_BATCH] for group in groups for at in range(0, len(group), _TEST_BATCH)]
