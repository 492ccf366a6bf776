"""DCL (2110.06848): decoupled contrastive learning, InfoNCE without the positive in its denominator.

-q.k/t + log sum over n of e^{q.n/t}. The pull on the positive no longer weakens as it comes near, which helps small
batches and queues. Replaces the base's own loss, averaged over views. On SimCLR the negatives are both views of the
other samples, as in the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Base, Embeddings, IncompatibleTerm, Part, needs_with_negatives
from methods.precision import full_precision
from methods.similarity import drop_own_column, similarities


@full_precision
def decoupled_info_nce(
    q: torch.Tensor,
    k: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    offset: int | None = None,
    same_view: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return -q.k/t + log sum over n of e^{q.n/t}, the batch mean (equation 6).

    q, k [B, C], negatives [N, C]; all of norm 1, with gradient wherever they have one.
    offset: as in `co2.consistency`, for `same_view` too.
    same_view: more negatives [N, C], all samples' embeddings of the query's view.
    """
    logits = drop_own_column(similarities(q, negatives), offset)
    if same_view is not None:
        logits = torch.cat([logits, drop_own_column(similarities(q, same_view), offset)], dim=1)
    return ((logits / temperature).logsumexp(dim=1) - (q * k).sum(dim=1) / temperature).mean()


@dataclass(frozen=True)
class DCL:
    """Decoupled InfoNCE instead of the base's own loss (2110.06848)."""

    weight: float = 1.0
    """Weight of the term."""
    temperature: float | None = None
    """Softmax temperature; null: the base's."""

    replaces: ClassVar[bool] = True

    def needs(self, base: Base) -> frozenset[str]:
        if not base.contrastive:
            raise IncompatibleTerm("dcl", f"{base.name} has no contrastive loss to replace: leave the term out")
        return needs_with_negatives(base) | (frozenset() if base.momentum_encoder else frozenset({"Q1", "Q2"}))

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        losses, temperature = [], self.temperature or base.temperature
        for a, b in base.pairs:
            negatives, offset = e.negatives(b)
            same_view = None if base.momentum_encoder else e[f"Q{a}"]
            losses.append(decoupled_info_nce(e[f"q{a}"], e[f"k{b}"], negatives, temperature, offset, same_view))
        return {"dcl": Part(self.weight, torch.stack(losses).mean())}
