"""BYOL (2006.07733): the online network predicts the momentum encoder's embedding; no negatives."""

from dataclasses import dataclass

import torch

from methods.base import Base, Embeddings, Part, needs_of
from methods.heads import byol_heads
from methods.precision import full_precision


@full_precision
def regression_loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return |q - k|^2 = 2 - 2 q.k for rows of norm 1, the batch mean (equation 2).

    q [B, C] with gradient, k [B, C] without.
    """
    return 2 - 2 * (q * k.detach()).sum(dim=1).mean()


@dataclass(frozen=True)
class BYOL:
    """The regression loss, summed over both views."""

    def needs(self, base: Base) -> frozenset[str]:
        return needs_of(base, "qk")

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        losses = [regression_loss(e[f"q{a}"], e[f"k{b}"]) for a, b in base.pairs]
        return {"regression": Part(1.0, torch.stack(losses).sum())}


BYOL_BASE = Base(
    "byol",
    byol_heads,
    BYOL,
    symmetric=True,
    contrastive=False,
    published={
        "method.ema_momentum": 0.996,
        "method.ema_schedule": "cosine",
        "model.dim": 256,
        "model.bn": "sync",
        "model.zero_init_residual": True,
    },
)
