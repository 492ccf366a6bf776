"""A linear classifier on frozen features: MoCo's protocol, MoCo v3's, or `fast`, on cached features.

moco: facebookresearch/moco `main_lincls.py` (1911.05722, section 4.1): SGD, rate 30, 100 epochs, times 0.1 after 60
and 80. moco_v3: facebookresearch/moco-v3 `main_lincls.py`: rate 0.1, 90 epochs, cosine by epoch.
Both: RandomResizedCrop and flip, momentum 0.9, no decay, the backbone in evaluation mode. Rates are for a batch of 256
and proportional to the batch. Unlike the originals, an epoch leaves out its last, incomplete batch.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.evaluate import classification, linear_fast
from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.resume import EpochCheckpoint
from engine.evaluate.trainer import Head, check_batch, sgd, train_classifier


@dataclass(frozen=True)
class Protocol:
    """Training of a linear classifier. Rates are for a batch of 256."""

    lr: float
    batch: int
    epochs: int
    schedule: Literal["steps", "cosine"]

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, for this batch."""
        highest, done = self.lr * self.batch / 256, epoch / self.epochs
        if self.schedule == "cosine":
            return highest * 0.5 * (1 + math.cos(math.pi * done))
        return highest * 0.1 ** sum(done >= milestone for milestone in (0.6, 0.8))


PROTOCOLS = {"moco": Protocol(30.0, 256, 100, "steps"), "moco_v3": Protocol(0.1, 1024, 90, "cosine")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of linear classifiers."""
    classification.add_arguments(parser)
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "fast"], default="moco", help="(default: moco)")
    parser.add_argument("--epochs", type=int, help="replaces the protocol's; milestones scale")
    parser.add_argument("--lr", type=float, help="learning rate for a batch of 256, replaces the protocol's")
    linear_fast.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train a linear classifier by the protocol, and score it on the test images."""
    evaluation = classification.build(args)
    evaluation.require_positive("epochs", "lr")
    if args.protocol == "fast":
        linear_fast.run(evaluation)
        return
    published = PROTOCOLS[args.protocol]
    batch = check_batch(args.batch or published.batch, len(evaluation.train))
    protocol = Protocol(args.lr or published.lr, batch, args.epochs or published.epochs, published.schedule)
    settings = evaluation.settings(protocol=args.protocol, **asdict(protocol))
    head = train(evaluation, protocol, settings)
    scores = evaluation.score(lambda images: head(evaluation.embed(images)), frozen=True)
    title = f"linear, {args.protocol}, {protocol.epochs} epochs"
    evaluation.write(f"linear_{args.protocol}", title, scores, settings)


def train(evaluation: ClassificationEvaluation, protocol: Protocol, settings: dict[str, Any]) -> Head:
    """Return the trained classifier. Resumes an interrupted training."""
    args, features = evaluation.args, evaluation.backbone.features
    head = Head(features, evaluation.classes, args.seed).to(evaluation.device)
    optimizer = sgd([{"params": list(head.parameters())}])
    checkpoint = EpochCheckpoint(evaluation, f"linear_{args.protocol}", head, optimizer, settings)
    train_classifier(
        checkpoint,
        head,
        evaluation.train,
        protocol.batch,
        protocol.epochs,
        lambda epoch: [protocol.rate(epoch)],
        remedy="--lr",
        prepare=evaluation.embed,
    )
    return head
