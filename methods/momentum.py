"""The momentum encoder: an exponential moving average of the online one (1911.05722, equation 2)."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from methods.heads import Encoder


def momentum_copy(online: Encoder) -> Encoder:
    """Return a copy of `online` that has no gradient and no predictor; its BatchNorm statistics are its own."""
    target = Encoder(copy.deepcopy(online.backbone), copy.deepcopy(online.projector), joint=online.joint)
    return target.requires_grad_(False)


def parameter_pairs(target: nn.Module, online: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the parameters of `target`, and those of `online` that they follow; frozen ones are left out."""
    followed = dict(online.named_parameters())
    names = [name for name, _ in target.named_parameters() if followed[name].requires_grad]
    return [target.get_parameter(name) for name in names], [followed[name] for name in names]


@torch.no_grad()
def update(target: list[torch.Tensor], online: list[torch.Tensor], momentum: float) -> None:
    """Set target <- momentum * target + (1 - momentum) * online, lists of parameters, in one multi-tensor operation."""
    torch._foreach_lerp_(target, online, 1 - momentum)


def cosine_momentum(momentum: float, progress: float) -> float:
    """Return 1 - (1 - momentum) (1 + cos(pi progress)) / 2: from `momentum` to 1 (2006.07733, section 3.3)."""
    return 1 - (1 - momentum) * 0.5 * (1 + math.cos(math.pi * progress))
