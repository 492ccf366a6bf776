"""Optimizers that update all parameters at once, and skip a step by a flag on the device."""

import torch
from torch import nn

from engine.config.settings import Optim
from engine.optim.lars import LARS


def build_optimizer(model: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters that require a gradient.

    A tensor `found_inf` [] on the device, set as its attribute, makes its steps change nothing while it is 1. Its
    learning rate may be a tensor on the device. Its state exists from the start, all 0: a skipped first step would
    otherwise leave it uninitialized.
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
        sgd: torch.optim.SGD = LARS(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=decay, trust=settings.trust_coefficient
        )
    else:
        sgd = torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=decay, fused=True)
    return begin_momentum(sgd) if settings.momentum else sgd


def begin_momentum(sgd: torch.optim.SGD) -> torch.optim.SGD:
    """Return `sgd` with all momentum buffers allocated, all 0, so that every checkpoint has them."""
    for group in sgd.param_groups:
        for p in group["params"]:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd
