"""The momentum encoder: an exponential moving average of the online one (1911.05722, equation 2)."""

from __future__ import annotations

import copy

import torch
from torch import nn


def momentum_copy(online: nn.Module) -> nn.Module:
    """Return a copy of `online` that has no gradient; its BatchNorm statistics are its own from then on."""
    target = copy.deepcopy(online)
    return target.requires_grad_(False)


@torch.no_grad()
def update(target: list[torch.Tensor], online: list[torch.Tensor], momentum: float) -> None:
    """Set target <- momentum * target + (1 - momentum) * online, lists of parameters, in one multi-tensor operation."""
    torch._foreach_lerp_(target, online, 1 - momentum)
