"""CO2 (2010.02217): the query's similarities to the negatives agree with those of its positive.

With negatives n_i, among which the positive is not: Q(i) = softmax_i(q.n_i / tau_con), the query's, and
P(i) = softmax_i(k.n_i / tau_con), the positive key's, serving as a soft label. The consistency term is
KL(P || Q) / 2 + KL(Q || P) / 2, the loss L_base + alpha L_CO2. Symbols are the paper's; `weight` is its alpha,
`temperature` its tau_con.

The defaults are for MoCo v2; for MoCo v1, weight 10 and temperature 0.04. They are not verified against the paper's
text. On bases without a queue, which the paper does not treat so, the negatives are the other samples' keys of
the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.base import Base, Embeddings, Part, with_negatives
from methods.precision import full_precision
from methods.similarity import others, similarities, symmetric_kl


@full_precision
def consistency(
    q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float, first: int | None = None
) -> torch.Tensor:
    """Return the symmetric KL divergence between the query's and its key's similarities, the mean over the batch.

    q [B, C] with gradient, k [B, C] and negatives [N, C] without; all of norm 1. first: where the samples' own keys
    are among the negatives, the row of the first sample's; that of sample i is first + i, and it is left out.
    """
    k, negatives = k.detach(), negatives.detach()
    query, key = (others(similarities(x, negatives), first) / temperature for x in (q, k))
    return symmetric_kl(query, key)


@dataclass(frozen=True)
class CO2:
    """Consistency of the similarities to the negatives (2010.02217)."""

    weight: float = 0.3
    """Factor of the term, the paper's alpha."""
    temperature: float = 0.05
    """Of both softmaxes, the paper's tau_con."""

    def needs(self, base: Base) -> frozenset[str]:
        """Return the names of queries, keys and negatives."""
        return with_negatives(base)

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        """Return the term as `co2`."""
        losses = []
        for a, b in base.pairs:
            negatives, first = e.negatives(b)
            losses.append(consistency(e[f"q{a}"], e[f"k{b}"], negatives, self.temperature, first))
        return {"co2": Part(self.weight, torch.stack(losses).mean())}
