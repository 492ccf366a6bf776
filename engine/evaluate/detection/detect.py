"""Object detection: Faster R-CNN, R50-C4, on the encoder, all of it tuned; VOC's average precision. Needs torchvision.

MoCo's protocol on PASCAL VOC (1911.05722, section 4.2.1; facebookresearch/moco `detection/`, whose detectron2 recipe is
in `engine/transfer/`): trained on VOC07+12 trainval for 24,000 iterations of 16, rate 0.02 after 100 iterations of
warm-up, times 0.1 after 18,000 and 22,000, decay 0.0001, shorter sides of 480 to 800 pixels; tested on VOC07 test at
800, by the eleven-point metric of 2007, at overlaps of 0.5 to 0.95. Ours: torchvision's detector (`faster_rcnn.py`
lists the differences), synchronized BatchNorm with its running statistics, a rate proportional to the batch.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import nn

from engine.evaluate import evaluation, trainer
from engine.evaluate.detection.faster_rcnn import faster_rcnn, torchvision
from engine.evaluate.detection.voc_ap import Boxes, score
from engine.evaluate.evaluation import Evaluation, shard
from engine.evaluate.resume import EpochCheckpoint
from engine.evaluate.trainer import check_batch, sgd
from engine.parallel import collectives
from engine.parallel.sync_batchnorm import synchronize
from methods.encoders import ResNet, place
from pipeline.dense.sample_loader import Samples
from pipeline.dense.voc_boxes import Boxed, Objects, open_boxed
from pipeline.system.counter_rng import keyed, uniforms
from pipeline.system.device import to_device
from pipeline.system.errors import InputError
from pipeline.system.thread_pool import Workers

logger = get_logger(__name__)

BATCH = 16
SIZES = tuple(range(480, 801, 32))
_MILESTONES, _FACTOR, _WARMUP_STEPS = (18 / 24, 22 / 24), 0.1, 100
_DECAY = 1e-4
_FLIPS, _CHOICES = 0x666C6970, 0x63686F696365  # keys of two random streams, apart from other modules'
_DRY_BATCHES = 2  # batches of training, and of testing
Sample = tuple[np.ndarray, Objects]


@dataclass
class Detection(Evaluation):
    """An encoder, and images with boxes as training and test set."""

    train: Boxed
    test: Boxed

    def check(self) -> None:
        """Create the folder of results. Raises InputError for it or for other options that cannot work."""
        args = self.args
        if not isinstance(self.encoder.backbone, ResNet):
            raise InputError(f"{self.encoder.architecture}: R50-C4 is built from a ResNet's stages: give a ResNet")
        self.require_positive("iterations", "lr")
        if not 32 <= min(args.sizes) <= max(args.sizes) <= args.largest:
            raise InputError(f"--sizes {min(args.sizes)} to {max(args.sizes)}: choose 32 to --largest {args.largest}")
        if collectives.world() > 1 and self.device.type == "cpu":
            raise InputError("several ranks without GPUs: synchronized BatchNorm needs images of one size: start one")
        super().check()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of detection."""
    evaluation.add_arguments(parser)
    parts = {"nargs": "+", "metavar": "FOLDER[:SET]"}
    parser.add_argument("--train", type=_part, required=True, help="VOC2007 VOC2012 (SET: trainval)", **parts)
    parser.add_argument("--test", type=_part, required=True, help="VOC2007 (SET: test)", **parts)
    parser.add_argument("--iterations", type=int, default=24000, help="steps in all (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.02, help=f"for a batch of {BATCH} (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="shorter sides, for training")
    parser.add_argument("--largest", type=int, default=1333, help="longer side at most (default: %(default)s)")
    parser.add_argument("--metric", choices=["voc07", "area"], default="voc07", help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="two steps and a test on two batches; saves nothing")
    parser.set_defaults(precision="no")


def _part(text: str) -> tuple[Path, str]:
    """Return a folder, and the name of a set or an empty text."""
    folder, _, name = text.partition(":")
    return Path(folder), name


def run(args: argparse.Namespace) -> None:
    """Train a detector, and score it on the test images."""
    torchvision()
    if not args.dry_run:
        _run(args)
        return
    with tempfile.TemporaryDirectory(prefix="millrace-", ignore_cleanup_errors=True) as folder:
        args.iterations, args.out = _DRY_BATCHES, Path(folder)
        _run(args)


def _open(args: argparse.Namespace) -> tuple[Boxed, Boxed]:
    train = open_boxed([(folder, name or "trainval") for folder, name in args.train])
    test = open_boxed([(folder, name or "test") for folder, name in args.test], train.classes)
    images = _DRY_BATCHES * (args.batch or BATCH)
    return (train.part(images), test.part(images)) if args.dry_run else (train, test)


def _run(args: argparse.Namespace) -> None:
    task = evaluation.build(Detection, args, lambda: _open(args))
    batch, classes = check_batch(args.batch or BATCH, len(task.train)), task.train.classes
    settings = task.settings(batch=batch, iterations=args.iterations, lr=args.lr, classes=list(classes))
    settings |= {"sizes": list(args.sizes), "largest": args.largest}
    logger.info("%d training images, %d test images, %d classes", len(task.train), len(task.test), len(classes))
    rows = detect(task, train(task, batch, settings))
    detections = [_of_class(rows, label) for label in range(len(classes))]
    scores = score(detections, _objects(task.test), classes, args.metric)
    more = {"metric": args.metric, "images": len(task.test)}
    task.write("detect", f"detection, {args.iterations} iterations", scores, settings, **more)


def train(task: Detection, batch: int, settings: dict[str, object]) -> nn.Module:
    """Return the trained detector. Resumes an interrupted training."""
    args = task.args
    assert isinstance(task.backbone, ResNet)
    torch.manual_seed(args.seed)  # determines the new layers
    sides = tuple(args.sizes), args.largest
    model = faster_rcnn(task.backbone, len(task.train.classes), *sides, task.encoder.statistics)
    place(synchronize(model), task.device)
    optimizer = sgd([{"params": list(model.parameters())}], weight_decay=_DECAY)
    samples = Samples(
        task.train.path,
        len(task.train),
        lambda epoch, index: _read(task.train, index, uniforms(keyed(_FLIPS, args.seed, epoch, index), 1)[0] < 0.5),
        batch=batch,
        seed=args.seed,
        **task.sharding,
    )

    def batches(epoch: int) -> Iterator[list[Sample]]:
        first = epoch * samples.steps
        for step, batch_samples in enumerate(samples.batches(first, args.iterations), start=first):
            # torchvision draws sizes and regions from torch's generator: seeded by step, so that a resume is exact.
            torch.manual_seed(int(keyed(_CHOICES, args.seed, step, collectives.rank())) >> 1)
            yield batch_samples

    checkpoint = EpochCheckpoint(task, "detect", model, optimizer, settings)
    with contextlib.closing(samples):
        trainer.train(
            checkpoint,
            model,
            batches,
            lambda wrapped, batch_samples: total_loss(wrapped, batch_samples, task.device),
            lambda step: [rate(args.lr * batch / BATCH, step, args.iterations)],
            epoch_steps=samples.steps,
            steps=args.iterations,
        )
    return model


def rate(peak: float, step: int, iterations: int) -> float:
    """Return the learning rate of a step: linear warm-up from a thousandth of the peak, then milestones."""
    warmup = 0.001 + 0.999 * min(1.0, step / _WARMUP_STEPS)
    return peak * warmup * _FACTOR ** sum(step / iterations >= milestone for milestone in _MILESTONES)


def total_loss(model: nn.Module, samples: list[Sample], device: torch.device) -> torch.Tensor:
    """Return the sum of the detector's losses: objectness and boxes of proposals, classes and boxes of regions."""
    images = [_pixels(image, device) for image, _ in samples]
    targets = [
        {"boxes": to_device(objects.boxes, device), "labels": to_device(objects.labels + 1, device)}  # 0: background
        for _, objects in samples
    ]
    losses: dict[str, torch.Tensor] = model(images, targets)
    return torch.stack(list(losses.values())).sum()


def _pixels(image: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an image, uint8 [H, W, 3], as float32 [3, H, W] from 0 to 1."""
    return to_device(np.ascontiguousarray(image), device).permute(2, 0, 1).float() / 255


def _read(data: Boxed, index: int, flip: bool) -> Sample:
    """Return a sample, mirrored if `flip`."""
    image, objects = data.read(index), data.objects[index]
    if not flip:
        return image, objects
    left, top, right, bottom = objects.boxes.T
    width = image.shape[1]
    return image[:, ::-1], objects._replace(boxes=np.stack([width - right, top, width - left, bottom], axis=1))


@torch.no_grad()
def detect(task: Detection, model: nn.Module) -> np.ndarray:
    """Return the detections in all test images, float64 [D, 7]: image, class, score and box."""
    model.eval()
    local, rows = shard(task.test), [np.zeros((0, 7))]
    with contextlib.closing(Workers(task.workers, lambda: None)) as workers:
        images = workers.in_order(lambda _, index: task.test.read(index), local.tolist(), ahead=8)
        for index, image in zip(task.progress(local.tolist(), "images"), images, strict=True):
            with task.accelerator.autocast():
                (detected,) = model([_pixels(image, task.device)])
            about = [torch.full_like(detected["scores"], index), detected["labels"] - 1.0, detected["scores"]]
            rows.append(torch.cat([torch.stack(about, dim=1), detected["boxes"]], dim=1).double().cpu().numpy())
    detections = torch.from_numpy(np.concatenate(rows)).to(task.device)
    counts = collectives.gather(torch.tensor([len(detections)], device=task.device)).tolist()
    return collectives.gather_uneven(detections, counts).cpu().numpy()


def _of_class(rows: np.ndarray, label: int) -> Boxes:
    """Return the detections of a class."""
    members = rows[rows[:, 1] == label]
    return Boxes(members[:, 0].astype(np.int64), members[:, 3:], members[:, 2])


def _objects(data: Boxed) -> list[Boxes]:
    """Return the objects of all images, by class."""
    images = np.repeat(np.arange(len(data)), [len(objects.labels) for objects in data.objects])
    boxes, labels, difficult = (np.concatenate(parts) for parts in zip(*data.objects, strict=True))
    return [
        Boxes(images[labels == label], boxes[labels == label], difficult[labels == label])
        for label in range(len(data.classes))
    ]
