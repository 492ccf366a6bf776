"""Training of evaluations, resumed after the last saved epoch, and its parts."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.resume import EpochCheckpoint
from engine.optim.optimizer import begin_momentum
from engine.parallel import collectives
from engine.parallel.accelerator import prepared
from engine.parallel.consensus import run_on_all_ranks
from methods.norm import count_batches
from pipeline.beton import Beton
from pipeline.system.device import to_device
from pipeline.system.errors import InputError

B = TypeVar("B")
_MIN_STEPS_TO_SAVE = 100


def train(
    checkpoint: EpochCheckpoint,
    model: nn.Module,
    batches: Callable[[int], Iterator[B]],
    loss_of: Callable[[nn.Module, B], torch.Tensor],
    rates: Callable[[int], list[float]],
    *,
    epoch_steps: int,
    steps: int,
    save_every_epoch: bool = False,
    remedy: str = "--lr",
) -> None:
    """Train `model` for `steps` steps, resumed from the checkpoint, which is saved after an epoch and at the end.

    batches: of that epoch and all later ones. rates: learning rates of a step, one for each parameter group.
    save_every_epoch: else short epochs share one save. remedy: options to lower after a non-finite loss, for
    which FloatingPointError is raised. The check waits for the device, once an epoch.
    """
    evaluation, first, began = checkpoint.evaluation, checkpoint.restore(), time.perf_counter()
    wrapped, optimizer = prepared(evaluation.accelerator, model, checkpoint.optimizer)
    wrapped.train()
    stream, save_every = batches(first), 1 if save_every_epoch else -(-_MIN_STEPS_TO_SAVE // epoch_steps)
    for epoch in evaluation.progress(range(first, -(-steps // epoch_steps)), "epochs"):
        end = min((epoch + 1) * epoch_steps, steps)
        for step in range(epoch * epoch_steps, end):
            for group, rate in zip(checkpoint.optimizer.param_groups, rates(step), strict=True):
                group["lr"] = rate
            loss = loss_of(wrapped, next(stream))
            evaluation.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            count_batches(model, 1)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"epoch {epoch + 1}: non-finite loss: choose a lower {remedy}")
        if (epoch + 1) % save_every == 0 or end == steps:
            checkpoint.save(epoch + 1)
    evaluation.training_seconds = time.perf_counter() - began


def train_classifier(
    checkpoint: EpochCheckpoint[ClassificationEvaluation],
    model: nn.Module,
    beton: Beton,
    batch: int,
    epochs: int,
    rates: Callable[[int], list[float]],
    *,
    remedy: str,
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
) -> None:
    """Train a classifier by cross-entropy on augmented crops, like `train`, saved after every epoch.

    rates: learning rates of an epoch. prepare: images [B, 3, S, S] to the input of `model`, without gradient.
    """
    evaluation = checkpoint.evaluation
    labels, loader = evaluation.labels(beton), evaluation.train_loader(beton, batch)

    def batches(first: int) -> Iterator[tuple[Any, torch.Tensor]]:
        loader.load_state_dict({**loader.state_dict(), "epoch": first})
        for crops in loader.endless():
            yield crops.views[0], labels[to_device(crops.ids, evaluation.device)]

    def loss_of(wrapped: nn.Module, batch: tuple[Any, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            inputs = prepare(batch[0])
        return F.cross_entropy(wrapped(inputs).float(), batch[1])

    with contextlib.closing(loader):
        steps = loader.steps
        train(
            checkpoint,
            model,
            batches,
            loss_of,
            lambda step: rates(step // steps),
            epoch_steps=steps,
            steps=epochs * steps,
            save_every_epoch=True,
            remedy=remedy,
        )


class Head(nn.Linear):
    """A linear classifier, computed in float32: features [B, F] to logits [B, C].

    Weights from N(0, 0.01) by `seed`, biases 0 (facebookresearch/moco `main_lincls.py`).
    """

    def __init__(self, features: int, classes: int, seed: int) -> None:
        super().__init__(features, classes)
        with torch.no_grad():
            self.weight.normal_(0.0, 0.01, generator=torch.Generator().manual_seed(seed))
            self.bias.zero_()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


def sgd(groups: list[dict[str, Any]], weight_decay: float = 0.0) -> torch.optim.SGD:
    """Return SGD of momentum 0.9, with momentum buffers of 0 from the start; learning rates are to be set."""
    return begin_momentum(torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=weight_decay))


def check_batch(batch: int, images: int) -> int:
    """Return the global batch size, at most all images. Raises InputError unless the world size divides it."""
    world = collectives.world()
    batch = min(batch, images // world * world)

    def check() -> None:
        if batch < 1 or batch % world:
            raise InputError(f"--batch {batch}: does not divide among {world} ranks: choose a multiple")

    run_on_all_ranks(check)
    return batch
