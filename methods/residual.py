"""Residual momentum (2211.09861): the student's embedding of a view follows the teacher's of the same view.

The intra-representation gap 1 - cos(q, k) lies between the online and the momentum encoder's embeddings of one view;
contrast across views does not close it. The loss is L_base + lambda L_res with L_res = mean (1 - cos(q1, sg k1)).
Symmetric bases average it over both views, whose keys they have already; others pay a momentum forward pass of view 1.

Gap and cosine are the paper's, by its abstract. Ours: q is taken after the predictor, if any; lambda is 1.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from methods.base import Base, Embeddings, IncompatibleTerm, Part
from methods.precision import full_precision


@full_precision
def gap(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos(q, k), the batch mean: q [B, C] with gradient, k [B, C] without, of the same view."""
    return 1 - F.cosine_similarity(q, k.detach(), dim=1).mean()


@dataclass(frozen=True)
class Residual:
    """The student-teacher gap on one view (2211.09861)."""

    weight: float = 1.0
    """Weight of the term, lambda."""

    def needs(self, base: Base) -> frozenset[str]:
        if not base.momentum_encoder:
            raise IncompatibleTerm("residual", f"{base.name} has no momentum encoder, so no gap: leave the term out")
        return frozenset(f"{kind}{a}" for kind in "qk" for a, _ in base.pairs)

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        gaps = [gap(e[f"q{a}"], e[f"k{a}"]) for a, _ in base.pairs]
        return {"residual": Part(self.weight, torch.stack(gaps).mean())}
