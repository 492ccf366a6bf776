"""MoCo (1911.05722) and MoCo v2 (2003.04297): instance discrimination against a queue of keys."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from methods.base import Base, Embeddings, Part, needs_of
from methods.heads import linear_head, moco_v2_head
from methods.precision import full_precision
from methods.similarity import similarities


@full_precision
def info_nce(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return -log e^{q.k/t} / (e^{q.k/t} + sum over n in queue of e^{q.n/t}), the batch mean (equation 1).

    q [B, C] with gradient, positives k [B, C], negatives queue [K, C]; all of norm 1.
    """
    positive = (q * k.detach()).sum(dim=1, keepdim=True)  # [B, 1]
    logits = torch.cat([positive, similarities(q, queue.detach())], dim=1) / temperature  # [B, 1 + K]
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, target)


@dataclass(frozen=True)
class MoCo:
    """InfoNCE against the queue. A symmetric base averages it over both views as queries, and enqueues k2 alone."""

    def needs(self, base: Base) -> frozenset[str]:
        return needs_of(base, "qk")

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        assert e.queue is not None, "MoCo has a queue"
        losses = [info_nce(e[f"q{a}"], e[f"k{b}"], e.queue, base.temperature) for a, b in base.pairs]
        return {"info_nce": Part(1.0, torch.stack(losses).mean())}


_SHARED = {
    "method.ema_momentum": 0.999,
    "method.ema_schedule": "constant",
    "method.queue_size": 65536,
    "model.dim": 128,
    "model.bn": "shuffle",
    "model.zero_init_residual": False,
}
V1 = Base("moco_v1", linear_head, MoCo, symmetric=False, queue=True, published={"method.temperature": 0.07, **_SHARED})
V2 = Base("moco_v2", moco_v2_head, MoCo, symmetric=False, queue=True, published={"method.temperature": 0.2, **_SHARED})
