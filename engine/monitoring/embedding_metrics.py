"""Measures of a step's embeddings that show whether contrastive training goes well."""

import math

import torch

from methods.base import Base, Embeddings
from methods.residual import gap


def spread(q: torch.Tensor) -> torch.Tensor:
    """Return the mean over dimensions of the standard deviation of q [B, C] over the batch, times sqrt(C).

    About 1 for embeddings spread evenly over the unit sphere, 0 for collapsed ones (2011.10566, section 4.1).
    """
    return q.std(dim=0).mean() * math.sqrt(q.shape[1])


def alignment(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of positive pairs, q and k [B, C] (2005.10242, section 4.1, alpha 2)."""
    return (q - k).square().sum(dim=1).mean()


def uniformity(q: torch.Tensor) -> torch.Tensor:
    """Return log mean e^{-2 |q_i - q_j|^2} over the pairs i < j of q [B, C], of norm 1 (2005.10242, section 4.1, t 2).

    From 0, collapsed, down to about -4, spread evenly.
    """
    rows, columns = torch.triu_indices(len(q), len(q), offset=1, device=q.device)
    distances = 2 - 2 * (q @ q.T)[rows, columns]
    return (-2 * distances).logsumexp(dim=0) - math.log(len(rows))


def effective_rank(q: torch.Tensor) -> torch.Tensor:
    """Return e^H of the singular values of the centered q [B, C], as shares of their sum (Roy and Vetterli, 2007)."""
    centered = (q - q.mean(dim=0)).double()
    values = torch.linalg.eigvalsh((centered.T @ centered).nan_to_num(0, 0, 0)).clamp_min(0).sqrt()  # [C]
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum()  # not special.entr, which CUDA compiles at its first call
    return entropy.exp().where(centered.isfinite().all(), torch.nan)


@torch.no_grad()
def measure(e: Embeddings, base: Base) -> dict[str, torch.Tensor]:
    """Return the measures of one rank's embeddings, scalars on their device.

    student_teacher_gap is 1 - cos(q, k) on one view, for methods with a momentum encoder. Alignment and positive
    similarity compare each query with its own key, negative similarity each query with the mean negative.
    """
    a, b = base.pairs[0]
    q, k = e[f"q{a}"].detach(), e[f"k{b}"].detach()
    measures = {
        "positive_similarity": (q * k).sum(dim=1).mean(),
        "negative_similarity": _negative_similarity(q, k, e),
        "embedding_std": spread(q),
        "alignment": alignment(q, k),
        "uniformity": uniformity(q),
        "effective_rank": effective_rank(q),
    }
    if base.momentum_encoder:
        measures["student_teacher_gap"] = gap(q, e[f"k{a}"])
    return measures


def _negative_similarity(q: torch.Tensor, k: torch.Tensor, e: Embeddings) -> torch.Tensor:
    """Return the mean similarity of the queries to the queue, or to the other samples' keys of this rank."""
    if e.queue is not None:
        return (q @ e.queue.to(q.dtype).mean(dim=0)).mean()
    others = k.sum(dim=0) - k  # [B, C]
    return (q * others).sum(dim=1).mean() / (len(k) - 1)
