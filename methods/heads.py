"""Projectors and predictors as published, and the encoder that ends in them.

A head is built from the backbone's features, the hidden width (None: as published), the embedding's dimensions, the
factory of its BatchNorm layers, and whether the backbone is a transformer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from methods.norm import Norm

Last = Literal["linear", "whiten", "scale"]
HeadPair = tuple[nn.Module, "nn.Module | None"]
"""Projector and predictor."""


def linear_head(features: int, hidden: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return MoCo's projector (1911.05722), one linear layer."""
    return nn.Linear(features, dim), None


def moco_v2_head(features: int, hidden: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return MoCo v2's projector (2003.04297): Linear(features, features), ReLU, Linear(features, dim)."""
    hidden = hidden or features
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)), None


def moco_v3_heads(features: int, hidden: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return MoCo v3's projector and predictor (2104.02057; facebookresearch/moco-v3 `builder.py`).

    ResNets: two layers each, BatchNorm without affine at the projector's end, none at the predictor's. Transformers:
    a projector of three layers, that BatchNorm at both ends.
    """
    hidden = hidden or 4096
    layers = 3 if transformer else 2
    projector = _mlp([features, *[hidden] * (layers - 1), dim], norm, last="whiten")
    return projector, _mlp([dim, hidden, dim], norm, last="whiten" if transformer else "linear")


def simclr_head(features: int, hidden: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return SimCLR's projector (2002.05709; google-research/simclr): BatchNorm everywhere, the last without bias."""
    return _mlp([features, hidden or features, dim], norm, last="scale"), None


def byol_heads(features: int, hidden: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return BYOL's projector and predictor (2006.07733; deepmind-research/byol): biases in the hidden layers alone."""
    hidden = hidden or 4096
    return _mlp([features, hidden, dim], norm, bias=True), _mlp([dim, hidden, dim], norm, bias=True)


def _mlp(sizes: list[int], norm: Norm, *, last: Last = "linear", bias: bool = False) -> nn.Sequential:
    """Return linear layers with BatchNorm and ReLU between; `bias` is the hidden layers', the last has none.

    last: what follows the last layer: nothing, BatchNorm without affine, or BatchNorm with a scale alone.
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(n_in, n_out, bias=bias), norm(n_out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
    if last != "linear":
        layers.append(norm(sizes[-1], affine=last == "scale"))
    if last == "scale":
        layers[-1].bias.requires_grad_(False)  # it stays 0
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """A backbone, a projector and perhaps a predictor: views to L2-normalized embeddings.

    All views go through one call, so that a wrapper such as DistributedDataParallel sees one forward pass a step; each
    view has its own batch statistics, but for `joint`, where all views are one batch.
    """

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None, *, joint: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor, self.joint = backbone, projector, predictor, joint

    def forward(self, *views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return embeddings [B, C] of norm 1, in float32 at least, one for each of the views [B, 3, H, W]."""
        if self.joint:
            return self._embed(torch.cat(views)).chunk(len(views))
        return tuple(self._embed(view) for view in views)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        z = self.projector(self.backbone(x))
        z = z if self.predictor is None else self.predictor(z)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
