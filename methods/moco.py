"""MoCo (1911.05722) and MoCo v2 (2003.04297): instance discrimination against a queue of keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

Parts = dict[str, torch.Tensor]


def info_nce(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return -log e^{q.k/t} / (e^{q.k/t} + sum over n in queue of e^{q.n/t}), the mean over the batch (equation 1).

    q [B, C] with gradient, k [B, C] its positives, queue [K, C] the negatives; all of norm 1. Float32 whatever the
    autocast type: float64 where q is.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach().to(dtype)
        positive = (q * k).sum(dim=1, keepdim=True)  # [B, 1]
        logits = torch.cat([positive, q @ queue.T], dim=1) / temperature  # [B, 1 + K]
        target = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return F.cross_entropy(logits, target)


class MoCo:
    """MoCo's loss over named embeddings; `symmetric` averages it with the views exchanged.

    Of x1, x2 the views: q1, q2 are online embeddings, k1, k2 momentum ones, [B, C] each.
    """

    def __init__(self, temperature: float, symmetric: bool) -> None:
        self.temperature, self.symmetric = temperature, symmetric
        self.needs = frozenset({"q1", "q2", "k1", "k2"} if symmetric else {"q1", "k2"})

    def __call__(self, embeddings: Mapping[str, torch.Tensor], queue: torch.Tensor) -> Parts:
        """Return the loss by its parts' names; their sum is what is minimised."""
        pairs = (("q1", "k2"), ("q2", "k1")) if self.symmetric else (("q1", "k2"),)
        losses = [info_nce(embeddings[q], embeddings[k], queue, self.temperature) for q, k in pairs]
        return {"info_nce": torch.stack(losses).mean()}

    def enqueued(self, embeddings: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the keys that go into the queue after the step, [B, C]: one key a sample."""
        return embeddings["k2"]
