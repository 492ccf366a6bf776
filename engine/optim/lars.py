"""LARS (1708.03888) as MoCo v3 uses it."""

from collections.abc import Callable
from typing import Any

import torch


class LARS(torch.optim.SGD):
    """SGD with each matrix's step scaled to its norm; biases and normalization (ndim 1 or less) are not scaled.

    For ndim > 1: g <- g + decay * w, then g <- g * trust * |w| / |g| (not scaled where either norm is 0). For all:
    v <- momentum * v + g, w <- w - lr * v. As in facebookresearch/moco-v3's `optimizer.py`, but in multi-tensor
    operations and torch's fused SGD, without host-device synchronization; the scaling costs a small kernel for each
    matrix on a GPU. The gradients are overwritten.
    """

    def __init__(
        self, params: Any, lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(params, lr, momentum, fused=True)
        self._decay, self._trust = weight_decay, trust

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scaled = [p for p in group["params"] if p.grad is not None and p.ndim > 1]
            gradients = [p.grad for p in scaled]
            if not scaled:
                continue
            # Add weight decay to the gradients, and scale each to the norm trust * |w|.
            torch._foreach_add_(gradients, scaled, alpha=self._decay)
            w, g = torch.stack(torch._foreach_norm(scaled)), torch.stack(torch._foreach_norm(gradients))
            ratios = torch.where((w > 0) & (g > 0), self._trust * w / g, 1.0)
            torch._foreach_mul_(gradients, list(ratios.unbind()))
        super().step()
        return loss
