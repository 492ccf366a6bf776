"""XMoCo (2206.04676): similarities survive an exchange of the transformations, and spread evenly over the negatives.

S_ij = q1_i . k2_j over the batch. Cross-similarity consistency: any pair of images, positive or negative, keeps its
similarity when the two transformations change places, S_ij = S_ji. Uniformity: the similarities of a query to the
batch's negatives are spread evenly, KL(U || softmax_{j != i}(S_ij / tau_u)). The loss is
L_base + lambda_cross L_cross + lambda_uni L_uni.

That the two are kept consistent and uniform is in the paper's abstract; distances (squared difference or symmetric
KL), temperatures and weights here are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from methods.base import Base, CannotCarry, Embeddings, Part, needs_of
from methods.precision import full_precision
from methods.similarity import others, similarities, symmetric_kl


@full_precision
def cross_similarity(
    q: torch.Tensor,
    k: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    form: Literal["mse", "kl"] = "mse",
    temperature: float = 0.2,
) -> torch.Tensor:
    """Return the distance of S to its transpose, over the rows of this process's samples.

    mse: the mean of (S_ij - S_ji)^2. kl: the symmetric KL divergence between softmax_j(S_ij / t) and
    softmax_j(S_ji / t), the mean over i.

    q, k [B, C]: queries and keys of this process; queries, keys [G, C]: of all (of one process, the same two again).
    All of norm 1; q and queries with gradient.
    """
    there, back = q @ keys.detach().T, k.detach() @ queries.T  # S_ij and S_ji, [B, G]
    if form == "mse":
        return (there - back).square().mean()
    return symmetric_kl(there / temperature, back / temperature)


@full_precision
def uniformity(q: torch.Tensor, negatives: torch.Tensor, temperature: float, first: int | None = None) -> torch.Tensor:
    """Return KL(U || softmax_j(q.n_j / t)), U uniform over the negatives, the mean over the batch.

    q [B, C] with gradient, negatives [N, C] without; all of norm 1. first: as in `co2.consistency`.
    """
    logits = others(similarities(q, negatives.detach()), first) / temperature
    return -logits.log_softmax(dim=1).mean() - math.log(logits.shape[1])


@dataclass(frozen=True)
class XMoCo:
    """Cross-similarity consistency and uniformity (2206.04676); a weight of 0 leaves one of the two out."""

    cross: float = 1.0
    """Factor of the cross-similarity consistency."""
    form: Literal["mse", "kl"] = "mse"
    """Distance between the similarities and their exchange: mean squared difference or symmetric KL divergence."""
    cross_temperature: float = 0.2
    """Of the softmaxes of form kl."""
    uniformity: float = 0.1
    """Factor of the uniformity."""
    temperature: float = 0.2
    """Of the uniformity's softmax."""
    negatives: Literal["batch", "queue"] = "batch"
    """Of the uniformity: the other samples' keys of the global batch, as in the paper, or the base's queue."""

    def needs(self, base: Base) -> frozenset[str]:
        """Return the names of the similarities' queries and keys."""
        if not self.cross and not self.uniformity:
            raise CannotCarry(
                "xmoco: cross and uniformity are both 0: give one of them a weight, or leave the term out"
            )
        if self.negatives == "queue" and not base.queue:
            raise CannotCarry(f"xmoco.negatives 'queue': {base.name} has no queue: choose batch")
        names = needs_of(base, "q")
        if self.cross:
            names |= needs_of(base, "kQK")
        if self.uniformity and self.negatives == "batch":
            names |= needs_of(base, "K")
        return names

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        """Return the two as `xmoco_cross` and `xmoco_uniformity`."""
        cross, spread = [], []
        for a, b in base.pairs:
            q = e[f"q{a}"]
            if self.cross:
                ours, all_of = e[f"k{b}"], (e[f"Q{a}"], e[f"K{b}"])
                cross.append(cross_similarity(q, ours, *all_of, self.form, self.cross_temperature))
            if self.uniformity:
                negatives, first = (e[f"K{b}"], e.first) if self.negatives == "batch" else e.negatives(b)
                spread.append(uniformity(q, negatives, self.temperature, first))
        both = {"xmoco_cross": (self.cross, cross), "xmoco_uniformity": (self.uniformity, spread)}
        return {name: Part(weight, torch.stack(losses).mean()) for name, (weight, losses) in both.items() if losses}
