"""Learning rate and momentum of each step: pure functions of the steps taken, which are counted on the device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from engine.config.settings import Method, Optim, Settings
from methods.momentum import cosine_momentum
from pipeline.system.errors import InputError

PATIENCE = 20
"""Skipped steps in a row after which training counts as diverged; fp16 skips about ten as its scale is found."""
DOUBTFUL = 3
"""Skipped steps in a row after which nothing is saved: the parameters may be finite, and useless all the same."""
_MOST_STEPS = 2**26  # the numbers of each are kept
Numbers = np.ndarray | float


class Schedule(nn.Module):
    """The learning rate and the moving average's share of the step to come, looked up on the device.

    A step that is skipped, because its loss or gradients are not finite, is not counted: what follows it is as if it
    had not been. So that nobody waits to learn of it, all of this lies on the device; `lr` and `share` are updated in
    place by `begin`, and may be parts of a CUDA graph.
    """

    taken: torch.Tensor
    """int64 [1]: steps taken."""
    skipped: torch.Tensor
    """int64 [1]: steps skipped since the last one taken."""

    def __init__(self, settings: Settings, steps_per_epoch: int, device: torch.device) -> None:
        super().__init__()
        total = settings.optim.epochs * steps_per_epoch
        if total > _MOST_STEPS:
            raise InputError(
                f"optim.epochs {settings.optim.epochs}: {total} steps in all, at most {_MOST_STEPS}: choose fewer"
            )
        steps = np.arange(total)
        rates = learning_rate(settings.optim, steps, steps_per_epoch, settings.data.batch)
        shares = 1 - momentum_after(settings.method, steps, len(steps))
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # what fused optimizers read
        table = torch.from_numpy(np.stack([rates, np.broadcast_to(shares, len(steps))])).to(device, dtype)
        self.register_buffer("_table", table, persistent=False)
        self.register_buffer("_now", table[:, :1].clone(), persistent=False)
        self.register_buffer("taken", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("skipped", torch.zeros(1, dtype=torch.int64, device=device))

    @property
    def lr(self) -> torch.Tensor:
        """Learning rate, []."""
        return self._now[0, 0]  # type: ignore[index]

    @property
    def share(self) -> torch.Tensor:
        """Share of the online parameters in the momentum encoder's update, 1 - momentum, []."""
        return self._now[1, 0]  # type: ignore[index]

    @torch.no_grad()
    def begin(self) -> None:
        """Look up the numbers of the step to come. After the last step they stay."""
        table: torch.Tensor = self._table  # type: ignore[assignment]
        torch.index_select(table, 1, self.taken.clamp(max=table.shape[1] - 1), out=self._now)  # type: ignore[arg-type]

    def numbers(self) -> dict[str, float]:
        """Return `lr` and `momentum` of the newest step. Waits for the device."""
        lr, share = torch.stack([self.lr, self.share]).tolist()
        digits = 15 if self.lr.dtype == torch.float64 else 7
        return {"lr": float(f"{lr:.{digits}g}"), "momentum": float(f"{1 - share:.{digits}g}")}

    def diverged(self, patience: int = PATIENCE) -> int:
        """Return how many steps were skipped in a row, 0 where fewer than `patience`. Waits for the device."""
        return skipped if (skipped := int(self.skipped)) >= patience else 0

    @torch.no_grad()
    def end(self, condition: torch.Tensor) -> None:
        """Count a step as taken where `condition`, one bool on the device, is true, else as skipped."""
        self.taken.add_(condition)
        self.skipped.add_(1).mul_(~condition)


def peak_rate(settings: Optim, batch: int) -> float:
    """Return the learning rate at its highest: lr, lr batch / 256 (1706.02677) or lr sqrt(batch / 256)."""
    factors = {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch / 256)}
    return settings.lr * factors[settings.lr_rule]


def learning_rate(settings: Optim, step: Numbers, steps_per_epoch: int, batch: int) -> Numbers:
    """Return the learning rate of `step`, counted over the whole run, for global batches of that size.

    Linear from 0 over the warm-up. Then for `cosine` the peak times (1 + cos(pi t)) / 2, t the share of the epochs
    after warm-up that is over (facebookresearch/moco and moco-v3 `adjust_learning_rate`); for `steps` the peak times
    `factor` for each milestone reached. Epochs are whole ones for `by: epoch`.
    """
    peak, epoch, warmup = peak_rate(settings, batch), np.asarray(step) / steps_per_epoch, settings.warmup_epochs
    counted = np.floor(epoch) if settings.schedule_interval == "epoch" else epoch
    if settings.schedule == "steps":
        rates = peak * settings.gamma ** np.searchsorted(settings.milestones, counted, side="right")
    elif settings.schedule == "constant":
        rates = np.full_like(epoch, peak)
    else:
        over = np.maximum(counted - warmup, 0.0) / (settings.epochs - warmup)
        rates = peak * 0.5 * (1 + np.cos(np.pi * over))
    return np.where(epoch < warmup, peak * epoch / (warmup or 1.0), rates)[()]


def momentum_after(settings: Method, step: Numbers, steps: int) -> Numbers:
    """Return the share of itself that the momentum encoder keeps in the update after `step` of `steps`.

    The keys of step s + 1 then come from an update by the momentum of s + 1, as where facebookresearch/moco-v3 updates
    at the beginning of each step (its first update changes nothing).
    """
    if settings.ema_momentum is None or settings.ema_schedule == "constant":
        return settings.ema_momentum or 0.0
    return cosine_momentum(settings.ema_momentum, (step + 1) / steps)
