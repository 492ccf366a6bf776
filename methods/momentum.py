"""The momentum encoder: an exponential moving average of the online one (1911.05722, equation 2)."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from methods.flat import flatten, refuse_strays
from methods.heads import Encoder


def momentum_copy(online: Encoder) -> Encoder:
    """Return a copy of `online` that has no gradient and no predictor; its BatchNorm statistics are its own."""
    target = Encoder(copy.deepcopy(online.backbone), copy.deepcopy(online.projector), joint=online.joint)
    return target.requires_grad_(False)


class MovingAverage:
    """Moves the parameters of `target` after those of `online`, all in one operation; frozen ones are left out.

    Both modules' parameters become parts of one buffer each (`methods.flat`).
    """

    def __init__(self, target: nn.Module, online: nn.Module) -> None:
        followed = dict(online.named_parameters())
        names = [name for name, _ in target.named_parameters() if followed[name].requires_grad]
        self._parts = [target.get_parameter(name) for name in names], [followed[name] for name in names]
        self._target, self._online = map(flatten, self._parts)

    def check(self) -> None:
        """Raise RuntimeError where a parameter has been given other memory."""
        refuse_strays(self._parts[0], self._target)
        refuse_strays(self._parts[1], self._online)

    @torch.no_grad()
    def update(self, share: torch.Tensor | float) -> None:
        """Set target <- target + share * (online - target): share 1 - m, one number, or tensor [] on the device.

        A share of 0 leaves the target as it is, but for the sign of zeros.
        """
        if isinstance(share, torch.Tensor):
            share = share.to(self._target.dtype)
        self._target.lerp_(self._online, share)


def cosine_momentum(momentum: float, progress: np.ndarray | float) -> np.ndarray | float:
    """Return 1 - (1 - momentum) (1 + cos(pi progress)) / 2: from `momentum` to 1 (2006.07733, section 3.3)."""
    return 1 - (1 - momentum) * 0.5 * (1 + np.cos(np.pi * progress))
