"""What several terms do with rows of similarities."""

from __future__ import annotations

import torch


def others(similarity: torch.Tensor, first: int | None) -> torch.Tensor:
    """Return `similarity` [B, N] without each row's own column, [B, N - 1]; as it is where `first` is None.

    first: the own column of row 0; that of row i is first + i.
    """
    if first is None:
        return similarity
    rows, columns = similarity.shape
    own = torch.arange(first, first + rows, device=similarity.device)[:, None]
    kept = torch.arange(columns - 1, device=similarity.device).expand(rows, -1)
    return similarity.gather(1, kept + (kept >= own))


def symmetric_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of (KL(A || B) + KL(B || A)) / 2, A and B the softmaxes of logits a, b [B, N].

    Which is the sum over columns of (A - B)(log A - log B) / 2.
    """
    log_a, log_b = a.log_softmax(dim=1), b.log_softmax(dim=1)
    return 0.5 * ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(dim=1).mean()
