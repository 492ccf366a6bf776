"""What several terms do with rows of similarities."""

from __future__ import annotations

from typing import Any

import torch


def similarities(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return q.k of all pairs, [B, N], in the type of q [B, C], without gradient to keys [N, C] of a lower type.

    Keys that are stored in bfloat16 are cast for the moment of each product; no copy of them is kept for the backward
    pass.
    """
    if keys.dtype == q.dtype:
        return q @ keys.T
    return _Cast.apply(q, keys)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(keys)
        return q @ keys.to(q.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (keys,) = ctx.saved_tensors
        return gradients[0] @ keys.to(gradients[0].dtype), None


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
