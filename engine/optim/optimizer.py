"""The optimizer: one that updates all parameters at once, and can be told on the device to leave them."""

from __future__ import annotations

import torch
from torch import nn

from engine.config.settings import Optim
from engine.optim.lars import LARS


def build_optimizer(model: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters that have a gradient.

    A tensor `found_inf` [] that is set on it, 1 or 0 on the device, tells its next step to change nothing, or not. Its
    learning rate may be a tensor on the device. Its state is there from the beginning, all 0: a first step that is
    skipped would else leave it unwritten.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = settings.weight_decay
    if settings.name == "adamw":
        on_gpu = any(p.is_cuda for p in parameters)
        adamw = torch.optim.AdamW(parameters, settings.lr, weight_decay=decay, fused=True, capturable=on_gpu)
        for p in parameters:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw.state[p] |= {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}
        return adamw
    if settings.name == "lars":
        made: torch.optim.SGD = LARS(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=decay, trust=settings.trust_coefficient
        )
    else:
        made = torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=decay, fused=True)
    return begin_momentum(made) if settings.momentum else made


def begin_momentum(sgd: torch.optim.SGD) -> torch.optim.SGD:
    """Return `sgd` with its momentum there from the beginning, all 0: what is kept and restored has it in any case."""
    for group in sgd.param_groups:
        for p in group["params"]:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd
