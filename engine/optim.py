"""The optimiser and the schedules. Learning rate and momentum are pure functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.config import Method, Optim
from engine.lars import LARS
from methods.momentum import cosine_momentum


def build_optimiser(model: nn.Module, settings: Optim, *, fused: bool = True) -> torch.optim.Optimizer:
    """Return the optimiser of all parameters that have a gradient; the learning rate is set each step.

    fused: one kernel. Not for fp16: a fused optimiser skips an overflowed step by itself, so that nobody can tell, and
    leaves the momentum of a first step unwritten.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = settings.weight_decay
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=decay, fused=fused)
    if settings.name == "lars":
        return LARS(parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=decay, trust=settings.trust)
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=decay, fused=fused)


def peak_rate(settings: Optim, batch: int) -> float:
    """Return the learning rate at its highest: lr, lr batch / 256 (1706.02677) or lr sqrt(batch / 256)."""
    factors = {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch / 256)}
    return settings.lr * factors[settings.lr_rule]


def learning_rate(settings: Optim, step: int, steps_per_epoch: int, batch: int) -> float:
    """Return the learning rate of `step`, counted over the whole run, for global batches of that size.

    Linear from 0 over the warm-up. Then for `cosine` the peak times (1 + cos(pi t)) / 2, t the share of the epochs
    after warm-up that is over (facebookresearch/moco and moco-v3 `adjust_learning_rate`); for `steps` the peak times
    `factor` for each milestone reached. Epochs are whole ones for `by: epoch`.
    """
    peak, epoch = peak_rate(settings, batch), step / steps_per_epoch
    if epoch < settings.warmup_epochs:
        return peak * epoch / settings.warmup_epochs
    if settings.by == "epoch":
        epoch = step // steps_per_epoch
    if settings.schedule == "steps":
        return peak * settings.factor ** sum(epoch >= milestone for milestone in settings.milestones)
    if settings.schedule == "constant":
        return peak
    over = max(epoch - settings.warmup_epochs, 0.0) / (settings.epochs - settings.warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * over))


def momentum_after(settings: Method, step: int, steps: int) -> float:
    """Return the share of itself that the momentum encoder keeps in the update after `step` of `steps`.

    The keys of step s + 1 then come from an update by the momentum of s + 1, as where facebookresearch/moco-v3 updates
    at the beginning of each step (its first update changes nothing).
    """
    if settings.momentum is None or settings.momentum_schedule == "constant":
        return settings.momentum or 0.0
    return cosine_momentum(settings.momentum, (step + 1) / steps)
