"""The momentum encoder: an exponential moving average (EMA) of the online encoder (1911.05722, equation 2)."""

import copy

import numpy as np
import torch
from torch import nn

from methods.flat import check_views, flatten
from methods.heads import Encoder


def momentum_copy(online: Encoder) -> Encoder:
    """Return a copy of `online` without gradient and predictor, with BatchNorm statistics of its own."""
    target = Encoder(copy.deepcopy(online.backbone), copy.deepcopy(online.projector), joint=online.joint)
    return target.requires_grad_(False)


class MovingAverage:
    """EMA of `online`'s parameters in `target`, all in one operation. Frozen parameters are left out.

    Both modules' parameters become views of one buffer each (`methods.flat`).
    """

    def __init__(self, target: nn.Module, online: nn.Module) -> None:
        trained = {name: p for name, p in online.named_parameters() if p.requires_grad}
        names = [name for name, _ in target.named_parameters() if name in trained]
        self._parameters = [target.get_parameter(name) for name in names], [trained[name] for name in names]
        self._target, self._online = map(flatten, self._parameters)

    def check(self) -> None:
        """Raise RuntimeError if a parameter has new memory."""
        for parameters, flat in zip(self._parameters, (self._target, self._online), strict=True):
            check_views(parameters, flat)

    @torch.no_grad()
    def update(self, weight: torch.Tensor | float) -> None:
        """Set target <- target + weight * (online - target).

        weight: 1 - m, a number or a tensor [] on the device. 0 leaves the target unchanged, but for the sign of zeros.
        """
        if isinstance(weight, torch.Tensor):
            weight = weight.to(self._target.dtype)
        self._target.lerp_(self._online, weight)


def cosine_momentum(ema_momentum: float, progress: np.ndarray | float) -> np.ndarray | float:
    """Return 1 - (1 - m) (cos(pi progress) + 1) / 2, from m = `ema_momentum` to 1 (2006.07733, section 3.3)."""
    return 1 - (1 - ema_momentum) * 0.5 * (1 + np.cos(np.pi * progress))
