"""SimCLR (2002.05709): contrast among all views of the global batch, with one network."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from methods.base import Base, Embeddings, Part
from methods.heads import simclr_head
from methods.precision import full_precision
from methods.similarity import drop_own_column


@full_precision
def nt_xent(
    z: torch.Tensor, other_view: torch.Tensor, same_view: torch.Tensor, temperature: float, offset: int = 0
) -> torch.Tensor:
    """Return NT-Xent of one view's embeddings, the batch mean (equation 1).

    z [B, C]; other_view [G, C], row offset + i is z_i's positive; same_view [G, C], row offset + i is z_i itself and
    left out. All of norm 1, all with gradient.
    """
    similarity = [z @ other_view.T, drop_own_column(z @ same_view.T, offset)]
    logits = torch.cat(similarity, dim=1) / temperature  # [B, 2 G - 1]
    return F.cross_entropy(logits, torch.arange(offset, offset + len(z), device=z.device))


@dataclass(frozen=True)
class SimCLR:
    """NT-Xent, averaged over both views."""

    def needs(self, base: Base) -> frozenset[str]:
        return frozenset({"q1", "q2", "Q1", "Q2"})

    def __call__(self, e: Embeddings, base: Base) -> dict[str, Part]:
        losses = [nt_xent(e[f"q{a}"], e[f"Q{b}"], e[f"Q{a}"], base.temperature, e.offset) for a, b in base.pairs]
        return {"info_nce": Part(1.0, torch.stack(losses).mean())}


SIMCLR = Base(
    "simclr",
    simclr_head,
    SimCLR,
    symmetric=True,
    momentum_encoder=False,
    joint=True,
    published={"method.temperature": 0.1, "model.dim": 128, "model.bn": "sync", "model.zero_init_residual": True},
)
