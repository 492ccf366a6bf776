"""SimCLR (2002.05709): contrast among all views of the global batch, by one network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from methods.base import Base, Embeddings, Part
from methods.heads import simclr_head
from methods.precision import full_precision
from methods.similarity import others


@full_precision
def nt_xent(
    z: torch.Tensor, other_views: torch.Tensor, same_views: torch.Tensor, temperature: float, first: int = 0
) -> torch.Tensor:
    """Return NT-Xent (equation 1) of one view's embeddings, the mean over the batch.

    z [B, C]; other_views [G, C], whose row first + i is the positive of z's row i; same_views [G, C], whose row
    first + i is z's row i itself and left out; all of norm 1, all with gradient.
    """
    logits = torch.cat([z @ other_views.T, others(z @ same_views.T, first)], dim=1) / temperature  # [B, 2 G - 1]
    return F.cross_entropy(logits, torch.arange(first, first + len(z), device=z.device))


@dataclass(frozen=True)
class SimCLR:
    """The mean of NT-Xent over both views."""

    def needs(self, base: Base) -> frozenset[str]:
        """Return the names of this process's and of all processes' queries."""
        return frozenset({"q1", "q2", "Q1", "Q2"})

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        """Return the loss as `info_nce`."""
        losses = [nt_xent(e[f"q{a}"], e[f"Q{b}"], e[f"Q{a}"], base.temperature, e.first) for a, b in base.pairs]
        return {"info_nce": Part(1.0, torch.stack(losses).mean())}


SIMCLR = Base(
    "simclr",
    simclr_head,
    SimCLR,
    symmetric=True,
    teacher=False,
    joint=True,
    published={
        "method.temperature": 0.1,
        "model.dim": 128,
        "model.bn": "sync",
        "model.zero_init_residual": True,
    },
)
