"""Rows of similarities, shared by several losses."""

from typing import Any

import torch


def similarities(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return q.k of all pairs [B, N], in the dtype of q [B, C]. Keys [N, C] of another dtype get no gradient.

    Keys stored in bfloat16 are cast again for each product; no cast copy is saved for the backward pass.
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


def drop_own_column(similarity: torch.Tensor, offset: int | None) -> torch.Tensor:
    """Return `similarity` [B, N] without column offset + i of each row i, [B, N - 1]; unchanged if `offset` is None."""
    if offset is None:
        return similarity
    rows, columns = similarity.shape
    dropped = torch.arange(offset, offset + rows, device=similarity.device)[:, None]
    column = torch.arange(columns - 1, device=similarity.device).expand(rows, -1)
    return similarity.gather(1, column + (column >= dropped))


def symmetric_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return (KL(A || B) + KL(B || A)) / 2, the mean over rows; A and B are the softmaxes of logits a, b [B, N].

    Computed as the sum over columns of (A - B)(log A - log B) / 2.
    """
    log_a, log_b = a.log_softmax(dim=1), b.log_softmax(dim=1)
    return 0.5 * ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(dim=1).mean()
