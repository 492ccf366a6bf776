"""Training loops of evaluations, resumed after the last saved epoch, and their parts."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.resume import EpochCheckpoint
from engine.optim.optimizer import begin_momentum
from engine.parallel import collectives
from engine.parallel.accelerator import prepared
from engine.parallel.consensus import run_on_all_ranks
from pipeline.beton import Beton
from pipeline.system.device import to_device
from pipeline.system.errors import InputError

B = TypeVar("B")
_MIN_STEPS_TO_SAVE = 100


def train_by_epochs(
    checkpoint: EpochCheckpoint[ClassificationEvaluation],
    beton: Beton,
    batch: int,
    epochs: int,
    rates: Callable[[int], list[float]],
    update: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    remedy: str,
) -> None:
    """Train a classifier on augmented crops, resumed from the checkpoint.

    rates: learning rates of an epoch, one for each parameter group. update: takes a step on images [B, 3, S, S] and
    labels int64 [B], and returns the loss. remedy: option to change after a non-finite loss.
    """
    evaluation, first = checkpoint.evaluation, checkpoint.restore()
    labels, loader = evaluation.labels(beton), evaluation.train_loader(beton, batch)

    def train(epoch: int) -> torch.Tensor:
        for group, rate in zip(checkpoint.optimizer.param_groups, rates(epoch), strict=True):
            group["lr"] = rate
        for crops in loader:
            (images,) = crops.views
            assert images is not None
            loss = update(images, labels[to_device(crops.ids, evaluation.device)])
        return loss

    with contextlib.closing(loader):
        loader.load_state_dict({**loader.state_dict(), "epoch": first})
        _run_epochs(checkpoint, range(first, epochs), train, remedy)


def train_by_steps(
    checkpoint: EpochCheckpoint,
    model: nn.Module,
    batches: Callable[[int, int], Iterator[B]],
    loss_of: Callable[[nn.Module, B], torch.Tensor],
    rate: Callable[[int], float],
    *,
    epoch_steps: int,
    iterations: int,
) -> None:
    """Train for `iterations` steps, resumed from the checkpoint. Several short epochs share one save.

    batches: of a range of steps. rate: learning rate of a step, for all parameters.
    """
    first, accelerator = checkpoint.restore(), checkpoint.evaluation.accelerator
    wrapped, optimizer = prepared(accelerator, model, checkpoint.optimizer)
    stream = batches(first * epoch_steps, iterations)

    def train(epoch: int) -> torch.Tensor:
        wrapped.train()
        for step, batch in enumerate(islice(stream, epoch_steps), start=epoch * epoch_steps):
            for group in checkpoint.optimizer.param_groups:
                group["lr"] = rate(step)
            loss = loss_of(wrapped, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    epochs = range(first, -(-iterations // epoch_steps))
    _run_epochs(checkpoint, epochs, train, "--lr", every=-(-_MIN_STEPS_TO_SAVE // epoch_steps))


def _run_epochs(
    checkpoint: EpochCheckpoint, epochs: range, train: Callable[[int], torch.Tensor], remedy: str, every: int = 1
) -> None:
    """Call `train`, which returns the last loss, for each epoch; save after `every` epochs and after the last.

    Raises FloatingPointError for a non-finite loss. The check waits for the device, once an epoch.
    """
    evaluation, began = checkpoint.evaluation, time.perf_counter()
    for epoch in evaluation.progress(epochs, "epochs"):
        if not math.isfinite(train(epoch).item()):
            raise FloatingPointError(f"epoch {epoch + 1}: non-finite loss: choose a lower {remedy}")
        if (epoch + 1) % every == 0 or epoch + 1 == epochs.stop:
            checkpoint.save(epoch + 1)
    evaluation.training_seconds = time.perf_counter() - began


def sgd(groups: list[dict[str, Any]], weight_decay: float = 0.0) -> torch.optim.SGD:
    """Return SGD of momentum 0.9, with momentum buffers of 0 from the start; learning rates are to be set."""
    return begin_momentum(torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=weight_decay))


def new_head(features: int, classes: int, seed: int) -> nn.Linear:
    """Return a linear classifier of weights from N(0, 0.01) and biases 0 (facebookresearch/moco `main_lincls.py`)."""
    head = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=generator)
        head.bias.zero_()
    return head


def check_batch(batch: int, images: int) -> int:
    """Return the global batch size, at most all images. Raises InputError unless the world size divides it."""
    world = collectives.world()
    batch = min(batch, images // world * world)

    def check() -> None:
        if batch < 1 or batch % world:
            raise InputError(f"--batch {batch}: does not divide among {world} ranks: choose a multiple")

    run_on_all_ranks(check)
    return batch
