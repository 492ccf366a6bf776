"""Learning rate and EMA momentum of each step: pure functions of the steps taken, which the device counts."""

import math

import numpy as np
import torch
from torch import nn

from engine.config.settings import Method, Optim, Settings
from methods.momentum import cosine_momentum
from pipeline.system.errors import InputError

PATIENCE = 20
"""Consecutive skipped steps after which training has diverged; fp16 skips about ten until its scale fits."""
DOUBTFUL = 3
"""Consecutive skipped steps after which nothing is saved: the parameters may be finite and still useless."""
_MAX_STEPS = 2**26  # the tables have two numbers for each
Numbers = np.ndarray | float


class Schedule(nn.Module):
    """Learning rate and EMA weight 1 - m of the next step, looked up on the device.

    A skipped step, one with non-finite loss or gradients, is not counted, and changes no later step. Counts and tables
    stay on the device, so that the host need not wait for them; `begin` updates `lr` and `ema_weight` in place, so that
    they may be parts of a CUDA graph.
    """

    taken: torch.Tensor
    """int64 [1]: steps taken."""
    skipped: torch.Tensor
    """int64 [1]: steps skipped since the last taken one."""

    def __init__(self, settings: Settings, steps_per_epoch: int, device: torch.device) -> None:
        super().__init__()
        total = settings.optim.epochs * steps_per_epoch
        if total > _MAX_STEPS:
            raise InputError(
                f"optim.epochs {settings.optim.epochs}: {total} steps in all, at most {_MAX_STEPS}: choose fewer"
            )
        steps = np.arange(total)
        rates = learning_rate(settings.optim, steps, steps_per_epoch, settings.data.batch)
        weights = 1 - momentum_after(settings.method, steps, len(steps))
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # the dtype that fused optimizers read
        table = torch.from_numpy(np.stack([rates, np.broadcast_to(weights, len(steps))])).to(device, dtype)
        self.register_buffer("_table", table, persistent=False)
        self.register_buffer("_now", table[:, :1].clone(), persistent=False)
        self.register_buffer("taken", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("skipped", torch.zeros(1, dtype=torch.int64, device=device))

    @property
    def lr(self) -> torch.Tensor:
        """Learning rate, []."""
        return self._now[0, 0]  # type: ignore[index]

    @property
    def ema_weight(self) -> torch.Tensor:
        """Weight of the online parameters in the momentum encoder's update, 1 - momentum, []."""
        return self._now[1, 0]  # type: ignore[index]

    @torch.no_grad()
    def begin(self) -> None:
        """Look up the numbers of the next step; after the last one they stay."""
        table: torch.Tensor = self._table  # type: ignore[assignment]
        torch.index_select(table, 1, self.taken.clamp(max=table.shape[1] - 1), out=self._now)  # type: ignore[arg-type]

    def numbers(self) -> dict[str, float]:
        """Return `lr` and `momentum` of the newest step. Waits for the device."""
        lr, ema_weight = torch.stack([self.lr, self.ema_weight]).tolist()
        digits = 15 if self.lr.dtype == torch.float64 else 7
        return {"lr": float(f"{lr:.{digits}g}"), "momentum": float(f"{1 - ema_weight:.{digits}g}")}

    def diverged(self, patience: int = PATIENCE) -> int:
        """Return the number of consecutive skipped steps, 0 if below `patience`. Waits for the device."""
        return skipped if (skipped := int(self.skipped)) >= patience else 0

    @torch.no_grad()
    def end(self, condition: torch.Tensor) -> None:
        """Count a step as taken if `condition`, a bool on the device, is true, else as skipped."""
        self.taken.add_(condition)
        self.skipped.add_(1).mul_(~condition)


def peak_rate(settings: Optim, batch: int) -> float:
    """Return the learning rate at its highest: lr, lr batch / 256 (1706.02677) or lr sqrt(batch / 256)."""
    factors = {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch / 256)}
    return settings.lr * factors[settings.lr_rule]


def learning_rate(settings: Optim, step: Numbers, steps_per_epoch: int, batch: int) -> Numbers:
    """Return the learning rate of `step`, counted from the run's first step, for global batches of that size.

    Linear from 0 over the warm-up. Then for `cosine` the peak times (1 + cos(pi t)) / 2, t the finished share of the
    epochs after warm-up (facebookresearch/moco and moco-v3 `adjust_learning_rate`); for `steps` the peak times `gamma`
    for each milestone reached. `schedule_interval: epoch` counts finished epochs, `step` fractions too.
    """
    peak, epoch, warmup = peak_rate(settings, batch), np.asarray(step) / steps_per_epoch, settings.warmup_epochs
    progress = np.floor(epoch) if settings.schedule_interval == "epoch" else epoch
    if settings.schedule == "steps":
        rates = peak * settings.gamma ** np.searchsorted(settings.milestones, progress, side="right")
    elif settings.schedule == "constant":
        rates = np.full_like(epoch, peak)
    else:
        finished = np.maximum(progress - warmup, 0.0) / (settings.epochs - warmup)
        rates = peak * 0.5 * (1 + np.cos(np.pi * finished))
    return np.where(epoch < warmup, peak * epoch / (warmup or 1.0), rates)[()]


def momentum_after(settings: Method, step: Numbers, steps: int) -> Numbers:
    """Return the momentum m of the momentum encoder's update after `step` of `steps`.

    The keys of step s + 1 then follow an update by the momentum of s + 1, as in facebookresearch/moco-v3, which updates
    at the beginning of each step (its first update changes nothing).
    """
    if settings.ema_momentum is None or settings.ema_schedule == "constant":
        return settings.ema_momentum or 0.0
    return cosine_momentum(settings.ema_momentum, (step + 1) / steps)
