"""LARS (1708.03888) as MoCo v3 uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """SGD whose step of each matrix is scaled to its norm; biases and normalisation (ndim 1 or less) are left alone.

    For ndim > 1: g <- g + decay * w, then g <- g * trust * |w| / |g| (not scaled where either norm is 0). For all:
    v <- momentum * v + g, w <- w - lr * v. So facebookresearch/moco-v3's `optimizer.py`; here mostly in
    multi-tensor operations, and waiting for nothing.
    """

    def __init__(
        self, params: Any, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step from the gradients; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, [p.grad for p in weights], group)
        return loss

    def _update(self, weights: list[torch.Tensor], gradients: list[Any], group: dict[str, Any]) -> None:
        scaled = [index for index, w in enumerate(weights) if w.ndim > 1]
        if scaled:
            for index, g in zip(scaled, _scaled(weights, gradients, scaled, group), strict=True):
                gradients[index] = g
        for w in weights:
            if "velocity" not in self.state[w]:
                self.state[w]["velocity"] = torch.zeros_like(w)
        velocities = [self.state[w]["velocity"] for w in weights]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(weights, velocities, alpha=-group["lr"])


def _scaled(
    weights: list[torch.Tensor], gradients: list[torch.Tensor], chosen: list[int], group: dict[str, Any]
) -> list[torch.Tensor]:
    """Return the chosen gradients with weight decay, each of the length trust * |w|."""
    w, g = [weights[i] for i in chosen], [gradients[i] for i in chosen]
    g = list(torch._foreach_add(g, w, alpha=group["weight_decay"]))
    lengths = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(g))
    ratios = torch.where((lengths[0] > 0) & (lengths[1] > 0), group["trust"] * lengths[0] / lengths[1], 1.0)
    torch._foreach_mul_(g, list(ratios.unbind()))
    return g
