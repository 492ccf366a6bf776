"""DCL (2110.06848), decoupled contrast: InfoNCE without the positive in its denominator.

-q.k/t + log sum over negatives of e^{q.n/t}: what pulls the positive no longer weakens as it comes near, so that
small batches and queues do better. It takes the place of the base's own loss, as the mean over views. On SimCLR the
negatives are both views of the other samples, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Base, CannotCarry, Embeddings, Part, with_negatives
from methods.precision import full_precision
from methods.similarity import others, similarities


@full_precision
def decoupled(
    q: torch.Tensor,
    k: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    first: int | None = None,
    same: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return -q.k/t + log sum_n e^{q.n/t} (equation 6), the mean over the batch.

    q, k [B, C], negatives [N, C], all of norm 1, gradient wherever they have it. first: as in `co2.consistency`.
    same: more negatives [N, C], the query's own view of all samples, the own rows left out as in `negatives`.
    """
    found = others(similarities(q, negatives), first)
    if same is not None:
        found = torch.cat([found, others(similarities(q, same), first)], dim=1)
    return ((found / temperature).logsumexp(dim=1) - (q * k).sum(dim=1) / temperature).mean()


@dataclass(frozen=True)
class DCL:
    """Decoupled contrast in place of the base's InfoNCE (2110.06848)."""

    weight: float = 1.0
    """Factor of the term."""
    temperature: float | None = None
    """Of the similarities; null: the base's."""

    replaces: ClassVar[bool] = True

    def needs(self, base: Base) -> frozenset[str]:
        """Return the names of queries, keys and negatives."""
        if not base.contrastive:
            raise CannotCarry(f"dcl: {base.name} has no contrastive loss that it could replace: leave the term out")
        return with_negatives(base) | (frozenset() if base.teacher else frozenset({"Q1", "Q2"}))

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        """Return the loss as `dcl`."""
        losses, temperature = [], self.temperature or base.temperature
        for a, b in base.pairs:
            negatives, first = e.negatives(b)
            same = None if base.teacher else e[f"Q{a}"]
            losses.append(decoupled(e[f"q{a}"], e[f"k{b}"], negatives, temperature, first, same))
        return {"dcl": Part(self.weight, torch.stack(losses).mean())}
