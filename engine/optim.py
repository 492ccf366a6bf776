"""The optimiser and its schedule. The learning rate is a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.config import Optim


def build_optimiser(model: nn.Module, settings: Optim, *, fused: bool = True) -> torch.optim.Optimizer:
    """Return SGD over all parameters; the learning rate is set each step.

    fused: one kernel. Not for fp16: a fused optimiser skips an overflowed step by itself, so that nobody can tell, and
    leaves the momentum of a first step unwritten.
    """
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def learning_rate(settings: Optim, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of `step`, counted over the whole run.

    Linear from 0 over the warm-up, then lr (1 + cos(pi t)) / 2, t the share of the epochs after warm-up that is over,
    in whole epochs for `by: epoch` (facebookresearch/moco `adjust_learning_rate`).
    """
    epoch = step / steps_per_epoch
    if epoch < settings.warmup_epochs:
        return settings.lr * epoch / settings.warmup_epochs
    if settings.schedule == "constant":
        return settings.lr
    if settings.by == "epoch":
        epoch = step // steps_per_epoch
    over = max(epoch - settings.warmup_epochs, 0.0) / (settings.epochs - settings.warmup_epochs)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * over))
