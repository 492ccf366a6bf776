"""Residual momentum (2211.09861): the student's embedding of a view follows the teacher's embedding of that same view.

The intra-representation gap 1 - cos(q, k), q and k the online and the momentum network's embeddings of one view, is
what a momentum encoder leaves between student and teacher; contrast across views does not close it. The loss is
L_base + lambda L_res with L_res = mean (1 - cos(q1, sg k1)), on symmetric bases the mean over both views, whose keys
are there already; on others it costs a momentum forward of view 1.

Gap and cosine are in the paper's abstract; that q is taken after the predictor, where there is one, and lambda 1, are
ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from methods.base import Base, CannotCarry, Embeddings, Part
from methods.precision import full_precision


@full_precision
def gap(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos(q, k), the mean over the batch: q [B, C] with gradient, k [B, C] without, of the same view."""
    return 1 - F.cosine_similarity(q, k.detach(), dim=1).mean()


@dataclass(frozen=True)
class Residual:
    """The student-teacher gap on one view (2211.09861)."""

    weight: float = 1.0
    """Factor of the term."""

    def needs(self, base: Base) -> frozenset[str]:
        """Return the names of both networks' embeddings of the queries' views."""
        if not base.teacher:
            raise CannotCarry(f"residual: {base.name} has no momentum encoder, and so no gap: leave the term out")
        return frozenset(f"{kind}{a}" for kind in "qk" for a, _ in base.pairs)

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        """Return the term as `residual`."""
        gaps = [gap(e[f"q{a}"], e[f"k{a}"]) for a, _ in base.pairs]
        return {"residual": Part(self.weight, torch.stack(gaps).mean())}
