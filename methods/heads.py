"""Projectors and predictors as published, and the encoder: backbone plus heads.

Heads are built from `features` (of the backbone), `mlp_dim` (hidden width; None: as published), `dim` (of the
embedding), `norm` (factory of BatchNorm layers) and `transformer` (whether the backbone is one).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from methods.norm import BatchNorm, Norm

Last = Literal["linear", "whiten", "scale"]
HeadPair = tuple[nn.Module, "nn.Module | None"]
"""Projector and predictor."""


def linear_head(features: int, mlp_dim: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return MoCo's projector (1911.05722), one linear layer."""
    return nn.Linear(features, dim), None


def moco_v2_head(features: int, mlp_dim: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return MoCo v2's projector (2003.04297): Linear(features, features), ReLU, Linear(features, dim)."""
    mlp_dim = mlp_dim or features
    return nn.Sequential(nn.Linear(features, mlp_dim), nn.ReLU(inplace=True), nn.Linear(mlp_dim, dim)), None


def moco_v3_heads(features: int, mlp_dim: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return MoCo v3's projector and predictor (2104.02057; facebookresearch/moco-v3 `builder.py`).

    ResNets: two layers each; the projector ends in BatchNorm without affine, the predictor in its linear layer.
    Transformers: three layers and two; both end in BatchNorm without affine.
    """
    mlp_dim = mlp_dim or 4096
    layers = 3 if transformer else 2
    projector = _mlp([features, *[mlp_dim] * (layers - 1), dim], norm, last="whiten")
    return projector, _mlp([dim, mlp_dim, dim], norm, last="whiten" if transformer else "linear")


def simclr_head(features: int, mlp_dim: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return SimCLR's projector (2002.05709; google-research/simclr): BatchNorm after each layer, the last unbiased."""
    return _mlp([features, mlp_dim or features, dim], norm, last="scale"), None


def byol_heads(features: int, mlp_dim: int | None, dim: int, norm: Norm, transformer: bool) -> HeadPair:
    """Return BYOL's projector and predictor (2006.07733; deepmind-research/byol): only hidden layers have biases."""
    mlp_dim = mlp_dim or 4096
    return _mlp([features, mlp_dim, dim], norm, bias=True), _mlp([dim, mlp_dim, dim], norm, bias=True)


def _mlp(sizes: list[int], norm: Norm, *, last: Last = "linear", bias: bool = False) -> nn.Sequential:
    """Return linear layers with BatchNorm and ReLU between them. The last layer has no bias.

    last: after the last layer, `linear`: nothing; `whiten`: BatchNorm without affine; `scale`: BatchNorm without bias.
    bias: biases of the hidden layers.
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
    """Backbone, projector and optional predictor: views to L2-normalized embeddings.

    One call takes all views, in one forward pass: half the kernels of two.
    joint: all views share their batch statistics; otherwise each has its own.
    """

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None, *, joint: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor, self.joint = backbone, projector, predictor, joint
        norms = [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._norms = [norm for norm in norms if isinstance(norm, BatchNorm)]
        self._apart = len(self._norms) < len(norms)  # a BatchNorm of torch's takes the statistics of all views
        self.kept_features: list[torch.Tensor] | None = None
        """Receives the backbone's features of each forward pass, without gradient; None: they are not kept."""

    def forward(self, *views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return an embedding [B, C] of norm 1, in float32 or better, for each view [B, 3, H, W]."""
        if not self.one_pass or (not self.joint and len({view.shape for view in views}) > 1):
            return tuple(self._pass(view)[0] for view in views)
        return self._pass(*views)

    @property
    def one_pass(self) -> bool:
        """Whether all views of a size are encoded in one forward pass."""
        return self.joint or not self._apart

    def _pass(self, *views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = self.projector(self.keep(self.backbone(self.joined(views))))
        return self.embeddings(z if self.predictor is None else self.predictor(z), len(views))

    def keep(self, features: torch.Tensor) -> torch.Tensor:
        """Keep a pass's features, where `kept_features` asks for them; return them."""
        if self.kept_features is not None:
            self.kept_features.append(features.detach())
        return features

    def joined(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the batch of a forward pass of these views, for which the BatchNorm layers are set."""
        for norm in self._norms:
            norm.views = self.passes(len(views))
        return torch.cat(list(views)) if len(views) > 1 else views[0]

    def embeddings(self, z: torch.Tensor, views: int) -> tuple[torch.Tensor, ...]:
        """Return the normalized embeddings of each view, from the heads' output for the batch."""
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1).chunk(views)

    def passes(self, views: int) -> int:
        """Return the number of batches, each with its own statistics, that so many views make."""
        return 1 if self.joint else views
