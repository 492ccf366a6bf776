"""Object detection: Faster R-CNN, R50-C4, on the encoder, all of it tuned; VOC's average precision. Wants torchvision.

As MoCo's on PASCAL VOC (1911.05722, section 4.2.1; facebookresearch/moco `detection/`, whose detectron2 recipe is
`engine/transfer/`): trained on VOC07+12 trainval for 24,000 iterations of 16, rate 0.02 after 100 iterations of
warm-up, times 0.1 after 18,000 and 22,000, decay 0.0001, shorter sides of 480 to 800 pixels; tested on VOC07 test at
800, by the eleven-point metric of 2007, at overlaps of 0.5 to 0.95. Ours: torchvision's detector (`faster_rcnn.py` says
how it differs), synchronized BatchNorm with its running statistics, the rate grows with the batch.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.evaluate.detection.faster_rcnn import faster_rcnn, torchvision
from engine.evaluate.detection.voc_ap import Boxes, precision
from engine.evaluate.evaluation import Trial, share_of, start
from engine.evaluate.trainer import Kept, check_batch, sgd, train_by_steps
from engine.parallel import collectives
from engine.parallel.sync_batchnorm import synchronize
from methods.encoders import ResNet, place
from pipeline.dense.sample_loader import Samples
from pipeline.dense.voc_boxes import Boxed, Objects, open_boxed
from pipeline.system.counter_rng import keyed, uniforms
from pipeline.system.device import to_device
from pipeline.system.errors import InputError
from pipeline.system.thread_pool import Workers

BATCH = 16
SIZES = tuple(range(480, 801, 32))
_STEPS, _FACTOR, _WARMUP = (18 / 24, 22 / 24), 0.1, 100
_DECAY = 1e-4
_FLIPS, _CHOICES = 0x666C6970, 0x63686F696365  # keep these random numbers apart from each other and other modules'
_DRY = 2  # batches, in training and in testing
Sample = tuple[np.ndarray, Objects]


@dataclass
class Detection(Trial):
    """An encoder and the images with boxes that it is tried on."""

    train: Boxed
    test: Boxed

    def check(self) -> None:
        """Raise InputError for options that cannot work."""
        args = self.args
        if not isinstance(self.encoder.backbone, ResNet):
            raise InputError(f"{self.encoder.architecture}: R50-C4 is made of a ResNet's stages: give a ResNet")
        for name, value in (("iterations", args.iterations), ("lr", args.lr)):
            if not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: choose a number above 0")
        if not 32 <= min(args.sizes) <= max(args.sizes) <= args.largest:
            raise InputError(f"--sizes {min(args.sizes)} to {max(args.sizes)}: choose 32 to --largest {args.largest}")
        if collectives.world() > 1 and self.device.type == "cpu":
            raise InputError(
                "several processes without GPUs: BatchNorm there wants images of one size: start one process"
            )
        super().check()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of detection."""
    parts = {"nargs": "+", "metavar": "FOLDER[:SET]"}
    parser.add_argument("--train", type=_part, required=True, help="VOC2007 VOC2012 (SET: trainval)", **parts)
    parser.add_argument("--test", type=_part, required=True, help="VOC2007 (SET: test)", **parts)
    parser.add_argument("--iterations", type=int, default=24000, help="steps in all (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.02, help=f"for a batch of {BATCH} (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="shorter sides, for training")
    parser.add_argument("--largest", type=int, default=1333, help="longer side at most (default: %(default)s)")
    parser.add_argument("--metric", choices=["voc07", "area"], default="voc07", help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="two steps, and a test on two batches; keeps nothing")
    parser.set_defaults(precision="no")


def _part(text: str) -> tuple[Path, str]:
    """Return a folder and the name of a set, nothing where there is none."""
    folder, _, name = text.partition(":")
    return Path(folder), name


def setup(args: argparse.Namespace) -> Detection:
    """Return the trial of a command line. Raises InputError, on all processes, for what cannot work."""
    torchvision()
    if not args.dry_run:
        return start(Detection, args, lambda: _open(args))
    args.iterations, args.out = _DRY, Path(tempfile.mkdtemp(prefix="millrace-"))
    try:
        return start(Detection, args, lambda: _open(args))
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True)
        raise


def _open(args: argparse.Namespace) -> tuple[Boxed, Boxed]:
    train = open_boxed([(folder, name or "trainval") for folder, name in args.train])
    test = open_boxed([(folder, name or "test") for folder, name in args.test], train.classes)
    some = _DRY * (args.batch or BATCH)
    return (train.part(some), test.part(some)) if args.dry_run else (train, test)


def run(trial: Detection) -> None:
    """Train a detector, and score it on the test images."""
    args = trial.args
    batch = check_batch(args.batch or BATCH, len(trial.train))
    classes = trial.train.classes
    settings = trial.settings(batch=batch, iterations=args.iterations, lr=args.lr, classes=list(classes))
    settings |= {"sizes": list(args.sizes), "largest": args.largest}
    trial.say(f"{len(trial.train)} images for training, {len(trial.test)} for testing, {len(classes)} classes")
    try:
        model, seconds = train(trial, batch, settings)
        found = tested(trial, model)
        true = _true(trial.test)
        scores = precision([_of_class(found, label) for label in range(len(classes))], true, classes, args.metric)
        result = {**scores.as_dict(), "metric": args.metric, "images": len(trial.test)}
        result |= {"training_seconds": round(seconds, 2), "settings": settings}
        trial.write("detect", result, f"detection, {args.iterations} iterations", f"{100 * scores.ap:.2f}", scores)
    finally:
        if args.dry_run:
            shutil.rmtree(trial.out, ignore_errors=True)


def train(trial: Detection, batch: int, settings: dict[str, object]) -> tuple[nn.Module, float]:
    """Return the detector and the seconds its training took; an attempt that was broken off is gone on from."""
    args = trial.args
    assert isinstance(trial.backbone, ResNet)
    torch.manual_seed(args.seed)  # the parts that are new
    model = faster_rcnn(trial.backbone, len(trial.train.classes), tuple(args.sizes), args.largest)
    if collectives.world() > 1:
        synchronize(model, trial.device)
    place(model, trial.device)
    optimizer = sgd([{"params": list(model.parameters())}], weight_decay=_DECAY)
    samples = Samples(
        trial.train.path,
        len(trial.train),
        lambda epoch, index: _flipped(trial.train, index, _flips(args.seed, epoch, index)),
        batch=batch,
        seed=args.seed,
        **trial.sharing,
    )

    def batches(first: int, last: int) -> Iterator[list[Sample]]:
        for step, some in enumerate(samples.batches(first, last), start=first):
            torch.manual_seed(int(keyed(_CHOICES, args.seed, step, collectives.rank())) >> 1)  # of sizes and regions
            yield some

    try:
        seconds = train_by_steps(
            trial,
            Kept(trial, "detect", model, optimizer, settings),
            model,
            optimizer,
            batches,
            lambda wrapped, some: losses(wrapped, some, trial.device),
            lambda step: rate(args.lr * batch / BATCH, step, args.iterations),
            epoch=samples.steps,
            iterations=args.iterations,
        )
    finally:
        samples.close()
    return model, seconds


def rate(highest: float, step: int, iterations: int) -> float:
    """Return the learning rate of a step: a thousandth of the highest to all of it over the warm-up, then in steps."""
    warmth = 0.001 + 0.999 * min(1.0, step / _WARMUP)
    return highest * warmth * _FACTOR ** sum(step / iterations >= at for at in _STEPS)


def losses(model: nn.Module, samples: list[Sample], device: torch.device) -> torch.Tensor:
    """Return the sum of the detector's losses: objectness and boxes of proposals, classes and boxes of regions."""
    images = [_pixels(image, device) for image, _ in samples]
    targets = [
        {"boxes": to_device(objects.boxes, device), "labels": to_device(objects.labels + 1, device)}  # 0: background
        for _, objects in samples
    ]
    found: dict[str, torch.Tensor] = model(images, targets)
    return torch.stack(list(found.values())).sum()


def _pixels(image: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an image, uint8 [H, W, 3], as float32 [3, H, W] of 0 to 1."""
    return to_device(np.ascontiguousarray(image), device).permute(2, 0, 1).float() / 255


def _flips(seed: int, epoch: int, index: int) -> bool:
    return bool(uniforms(keyed(_FLIPS, seed, epoch, index), 1)[0] < 0.5)


def _flipped(data: Boxed, index: int, flip: bool) -> Sample:
    """Return a sample, mirrored if so."""
    image, objects = data.read(index), data.objects[index]
    if not flip:
        return image, objects
    left, top, right, bottom = objects.boxes.T
    width = image.shape[1]
    return image[:, ::-1], objects._replace(boxes=np.stack([width - right, top, width - left, bottom], axis=1))


@torch.no_grad()
def tested(trial: Detection, model: nn.Module) -> np.ndarray:
    """Return the detections in all test images: float64 [D, 7], of image, class, score and box."""
    model.eval()
    own, rows = share_of(trial.test), [np.zeros((0, 7))]
    workers = Workers(trial.workers, lambda: None)
    images = workers.in_order(lambda _, index: trial.test.read(index), own.tolist(), ahead=8)
    try:
        for index, image in zip(trial.shown(own.tolist(), "images"), images, strict=True):
            with trial.accelerator.autocast():
                (found,) = model([_pixels(image, trial.device)])
            about = torch.stack(
                [torch.full_like(found["scores"], index), found["labels"] - 1.0, found["scores"]], dim=1
            )
            rows.append(torch.cat([about, found["boxes"]], dim=1).double().cpu().numpy())
    finally:
        workers.close()
    local = torch.from_numpy(np.concatenate(rows)).to(trial.device)
    counts = collectives.gather(torch.tensor([len(local)], device=trial.device)).tolist()
    return collectives.gather_uneven(local, counts).cpu().numpy()


def _of_class(rows: np.ndarray, label: int) -> Boxes:
    mine = rows[rows[:, 1] == label]
    return Boxes(mine[:, 0].astype(np.int64), mine[:, 3:], mine[:, 2])


def _true(data: Boxed) -> list[Boxes]:
    """Return the objects of all images, by class."""
    images = np.repeat(np.arange(len(data)), [len(one.labels) for one in data.objects])
    boxes, labels, difficult = (np.concatenate(parts) for parts in zip(*data.objects, strict=True))
    return [
        Boxes(images[labels == label], boxes[labels == label], difficult[labels == label])
        for label in range(len(data.classes))
    ]
