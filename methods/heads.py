"""Projection heads, and the encoder that ends in one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def moco_v2_head(features: int, dim: int) -> nn.Sequential:
    """Return MoCo v2's projector (2003.04297): Linear(features, features), ReLU, Linear(features, dim)."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))


class Encoder(nn.Module):
    """A backbone and a head: views to L2-normalised embeddings.

    All views go through one call, so that a wrapper such as DistributedDataParallel sees one forward pass a step; each
    view has its own batch statistics.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return embeddings [B, C] of norm 1, in float32 at least, one for each of the views [B, 3, H, W]."""
        return tuple(self._embed(view) for view in views)

    def _embed(self, view: torch.Tensor) -> torch.Tensor:
        z = self.head(self.backbone(view))
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
