"""A linear classifier on frozen features: MoCo's protocol, MoCo v3's, or `fast`, on features that are kept.

moco: facebookresearch/moco `main_lincls.py` (1911.05722, section 4.1): SGD, rate 30, 100 epochs, times 0.1 after 60
and 80. moco_v3: facebookresearch/moco-v3 `main_lincls.py`: rate 0.1 for a batch of 256, 90 epochs, cosine by epoch.
Both: RandomResizedCrop and flip, momentum 0.9, no decay, the backbone in evaluation mode. The rates are for a batch of
256 and grow with the batch. An epoch leaves out what is over from whole batches, which the originals do not.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from engine.evaluate import linear_fast
from engine.evaluate.accuracy import score
from engine.evaluate.classification import Bench
from engine.evaluate.trainer import Kept, check_batch, new_head, sgd
from engine.parallel import collectives
from pipeline.system.device import to_device
from pipeline.system.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """How a linear classifier is trained. Rates are for a batch of 256."""

    lr: float
    batch: int
    epochs: int
    schedule: Literal["steps", "cosine"]

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, for this batch."""
        highest, done = self.lr * self.batch / 256, epoch / self.epochs
        if self.schedule == "cosine":
            return highest * 0.5 * (1 + math.cos(math.pi * done))
        return highest * 0.1 ** sum(done >= at for at in (0.6, 0.8))


PROTOCOLS = {"moco": Protocol(30.0, 256, 100, "steps"), "moco_v3": Protocol(0.1, 1024, 90, "cosine")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of linear classifiers."""
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "fast"], default="moco", help="(default: moco)")
    parser.add_argument("--epochs", type=int, help="in place of the protocol's; steps move with them")
    parser.add_argument("--lr", type=float, help="for a batch of 256, in place of the protocol's")
    linear_fast.add_arguments(parser)


def run(bench: Bench) -> None:
    """Train a linear classifier as the protocol says, and score it on the test images."""
    args = bench.args
    for name in ("epochs", "lr"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            raise InputError(f"--{name} {value}: choose a number above 0")
    if args.protocol == "fast":
        linear_fast.run(bench)
        return
    usual = PROTOCOLS[args.protocol]
    batch = check_batch(args.batch or usual.batch, len(bench.train))
    protocol = Protocol(args.lr or usual.lr, batch, args.epochs or usual.epochs, usual.schedule)
    settings = bench.settings(protocol=args.protocol, **asdict(protocol))
    head, seconds = train(bench, protocol, Kept, settings)
    ranked, true = bench.ranked(lambda images: head(bench.embed(images)))
    bench.check_frozen()
    what = f"linear, {args.protocol}, {protocol.epochs} epochs"
    scores = score(ranked, true, bench.test.classes)
    bench.finish(f"linear_{args.protocol}", what, scores, training_seconds=round(seconds, 2), settings=settings)


def train(bench: Bench, protocol: Protocol, keeper: type[Kept], settings: dict[str, Any]) -> tuple[nn.Linear, float]:
    """Return the classifier and the seconds it took; what was kept of an earlier attempt is gone on from."""
    head = new_head(bench.backbone.features, bench.classes, bench.args.seed).to(bench.device)  # type: ignore[arg-type]
    optimizer = sgd([{"params": list(head.parameters())}])
    kept = keeper(bench, f"linear_{bench.args.protocol}", head, optimizer, settings)
    labels, done = bench.labels(bench.train), kept.restore()
    loader = bench.train_loader(bench.train, protocol.batch)
    loader.load_state_dict({**loader.state_dict(), "epoch": done})
    began = time.perf_counter()
    try:
        for epoch in bench.shown(range(done, protocol.epochs), "epochs"):
            for group in optimizer.param_groups:
                group["lr"] = protocol.rate(epoch)
            loss = torch.zeros((), device=bench.device)
            for batch in loader:
                (view,) = batch.views
                assert view is not None
                with torch.no_grad():
                    features = bench.embed(view)
                loss = F.cross_entropy(head(features), labels[to_device(batch.ids, bench.device)])
                optimizer.zero_grad()
                loss.backward()
                for parameter in head.parameters():
                    parameter.grad = collectives.mean(parameter.grad)  # type: ignore[arg-type]
                optimizer.step()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is not finite: choose a lower --lr")
            kept.save(epoch + 1)
    finally:
        loader.close()
    return head, time.perf_counter() - began
