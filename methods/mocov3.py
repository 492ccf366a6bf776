"""MoCo v3 (2104.02057): symmetric contrast against the keys of the global batch, with a predictor."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from methods.base import Base, Embeddings, Part, needs_of
from methods.heads import moco_v3_heads
from methods.precision import full_precision


@full_precision
def contrastive_loss(q: torch.Tensor, keys: torch.Tensor, temperature: float, offset: int = 0) -> torch.Tensor:
    """Return the cross entropy of q.keys/t against each query's own key, the batch mean (equation 1).

    q [B, C] with gradient, keys [G, C] of the global batch; all of norm 1. Query i's own key is row offset + i.
    """
    target = torch.arange(offset, offset + len(q), device=q.device)
    return F.cross_entropy(q @ keys.detach().T / temperature, target)


@dataclass(frozen=True)
class MoCoV3:
    """2 t [CE(q1 k2'/t, diag) + CE(q2 k1'/t, diag)], as `ctr_loss` of facebookresearch/moco-v3's `builder.py`."""

    def needs(self, base: Base) -> frozenset[str]:
        return needs_of(base, "qK")

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        losses = [contrastive_loss(e[f"q{a}"], e[f"K{b}"], base.temperature, e.offset) for a, b in base.pairs]
        return {"info_nce": Part(2 * base.temperature, torch.stack(losses).sum())}


V3 = Base(
    "moco_v3",
    moco_v3_heads,
    MoCoV3,
    symmetric=True,
    published={
        "method.temperature": 1.0,
        "method.ema_momentum": 0.99,
        "method.ema_schedule": "cosine",
        "model.dim": 256,
        "model.bn": "sync",
        "model.zero_init_residual": True,
    },
)
