"""CO2 (2010.02217): query and positive key agree in their similarities to the negatives.

Over the negatives n_i, without the positive: Q(i) = softmax_i(q.n_i / tau_con) for the query, and
P(i) = softmax_i(k.n_i / tau_con) for the key, a soft label. L_CO2 = KL(P || Q) / 2 + KL(Q || P) / 2, and the loss is
L_base + alpha L_CO2, alpha the `weight` and tau_con the `temperature`.

The defaults are for MoCo v2; MoCo v1 takes weight 10, temperature 0.04. Symbols and values are not verified against the
paper's text. Ours: on bases without a queue the negatives are the other samples' keys of the global batch.
"""

from dataclasses import dataclass

import torch

from methods.base import Base, Embeddings, Part, needs_with_negatives
from methods.precision import full_precision
from methods.similarity import drop_own_column, similarities, symmetric_kl


@full_precision
def consistency(
    q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float, offset: int | None = None
) -> torch.Tensor:
    """Return the symmetric KL divergence between query's and key's similarities to the negatives, the batch mean.

    q [B, C] with gradient, k [B, C] and negatives [N, C] without; all of norm 1.
    offset: set where the negatives include the samples' own keys: query i's own key is row offset + i and left out.
    """
    k, negatives = k.detach(), negatives.detach()
    query, key = (drop_own_column(similarities(x, negatives), offset) / temperature for x in (q, k))
    return symmetric_kl(query, key)


@dataclass(frozen=True)
class CO2:
    """Consistency of the similarities to the negatives (2010.02217)."""

    weight: float = 0.3
    """Weight of the term, alpha (not verified against the paper)."""
    temperature: float = 0.05
    """Temperature of both softmaxes, tau_con (not verified against the paper)."""

    def needs(self, base: Base) -> frozenset[str]:
        return needs_with_negatives(base)

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        losses = []
        for a, b in base.pairs:
            negatives, offset = e.negatives(b)
            losses.append(consistency(e[f"q{a}"], e[f"k{b}"], negatives, self.temperature, offset))
        return {"co2": Part(self.weight, torch.stack(losses).mean())}
