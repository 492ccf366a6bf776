"""XMoCo (2206.04676): similarities survive an exchange of the transformations and spread evenly over the negatives.

S_ij = q1_i . k2_j over the batch. Cross-similarity consistency: any pair of images, positive or negative, keeps its
similarity when the transformations change places, S_ij = S_ji. Uniformity: a query's similarities to the batch's
negatives are spread evenly, L_uni = KL(U || softmax_{j != i}(S_ij / tau_u)). The loss is
L_base + lambda_cross L_cross + lambda_uni L_uni.

Consistency and uniformity are the paper's, by its abstract; its text was not available. Ours: symbols, distances
(squared difference or symmetric KL), temperatures and weights.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from methods.base import Base, Embeddings, IncompatibleTerm, Part, needs_of
from methods.precision import full_precision
from methods.similarity import drop_own_column, similarities, symmetric_kl


@full_precision
def cross_similarity(
    q: torch.Tensor,
    k: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    form: Literal["mse", "kl"] = "mse",
    temperature: float = 0.2,
) -> torch.Tensor:
    """Return the distance between S and its transpose, over the rows of this rank's samples.

    q, k [B, C]: this rank's queries and keys. queries, keys [G, C]: all ranks' (on one rank q and k again),
    G = world size x B. All of norm 1; q and queries with gradient.
    form: `mse`, the mean of (S_ij - S_ji)^2; `kl`, the symmetric KL divergence between softmax_j(S_ij / t) and
    softmax_j(S_ji / t), the mean over i.
    """
    s_ij, s_ji = q @ keys.detach().T, k.detach() @ queries.T  # [B, G]
    if form == "mse":
        return (s_ij - s_ji).square().mean()
    return symmetric_kl(s_ij / temperature, s_ji / temperature)


@full_precision
def uniformity(q: torch.Tensor, negatives: torch.Tensor, temperature: float, offset: int | None = None) -> torch.Tensor:
    """Return KL(U || softmax_j(q.n_j / t)), U uniform over the negatives, the batch mean.

    q [B, C] with gradient, negatives [N, C] without; all of norm 1. offset: as in `co2.consistency`.
    """
    logits = drop_own_column(similarities(q, negatives.detach()), offset) / temperature
    return -logits.log_softmax(dim=1).mean() - math.log(logits.shape[1])


@dataclass(frozen=True)
class XMoCo:
    """Cross-similarity consistency and uniformity (2206.04676). A weight of 0 leaves one out."""

    cross: float = 1.0
    """Weight of the cross-similarity consistency, lambda_cross (ours)."""
    form: Literal["mse", "kl"] = "mse"
    """Distance between S and its transpose (ours): mean squared difference or symmetric KL divergence."""
    cross_temperature: float = 0.2
    """Temperature of the softmaxes of form kl (ours)."""
    uniformity: float = 0.1
    """Weight of the uniformity, lambda_uni (ours)."""
    temperature: float = 0.2
    """Temperature of the uniformity's softmax, tau_u (ours)."""
    negatives: Literal["batch", "queue"] = "batch"
    """Negatives of the uniformity: the other samples' keys of the global batch, by the paper's abstract, or the
    queue."""

    def needs(self, base: Base) -> frozenset[str]:
        if not self.cross and not self.uniformity:
            raise IncompatibleTerm("xmoco", "cross and uniformity are both 0: set a weight, or leave the term out")
        if self.negatives == "queue" and not base.queue:
            raise IncompatibleTerm("xmoco.negatives", f"{base.name} has no queue: choose batch", "'queue'")
        names = needs_of(base, "q")
        if self.cross:
            names |= needs_of(base, "kQK")
        if self.uniformity and self.negatives == "batch":
            names |= needs_of(base, "K")
        return names

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        cross, spread = [], []
        for a, b in base.pairs:
            q = e[f"q{a}"]
            if self.cross:
                gathered = e[f"Q{a}"], e[f"K{b}"]
                cross.append(cross_similarity(q, e[f"k{b}"], *gathered, self.form, self.cross_temperature))
            if self.uniformity:
                negatives, offset = (e[f"K{b}"], e.offset) if self.negatives == "batch" else e.negatives(b)
                spread.append(uniformity(q, negatives, self.temperature, offset))
        both = {"xmoco_cross": (self.cross, cross), "xmoco_uniformity": (self.uniformity, spread)}
        return {name: Part(weight, torch.stack(losses).mean()) for name, (weight, losses) in both.items() if losses}
