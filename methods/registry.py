"""What there is to choose from, by name. A new base method, architecture or term is a file and a line here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from methods import byol, moco, mocov3, simclr
from methods.base import Base, Objective
from methods.co2 import CO2
from methods.dcl import DCL
from methods.encoders import Stem, resnet
from methods.heads import Encoder
from methods.norm import GROUPS, BatchNormKind, norm_layers
from methods.residual import Residual
from methods.vit import VITS, VisionTransformer, vit
from methods.xmoco import XMoCo

BASES: dict[str, Base] = {base.name: base for base in (moco.V1, moco.V2, mocov3.V3, simclr.SIMCLR, byol.BYOL_BASE)}


@dataclass(frozen=True)
class Terms:
    """Terms beside the base's own loss; those that are set are computed."""

    co2: CO2 | None = None
    """Consistency of the similarities to the negatives (2010.02217)."""
    xmoco: XMoCo | None = None
    """Cross-similarity consistency and uniformity (2206.04676)."""
    residual: Residual | None = None
    """Student-teacher gap on one view (2211.09861)."""
    dcl: DCL | None = None
    """Decoupled contrast in place of the base's InfoNCE (2110.06848)."""


def build_objective(base: Base, terms: Terms) -> Objective:
    """Return the base's loss with those terms. Raises CannotCarry for a term that the base cannot carry."""
    chosen = {field.name: getattr(terms, field.name) for field in fields(terms)}
    return Objective(base, base.loss(), {name: term for name, term in chosen.items() if term is not None})


def build_backbone(
    arch: str,
    *,
    stem: Stem = "imagenet",
    width: float = 1.0,
    bn: BatchNormKind = "plain",
    groups: int = GROUPS,
    zero_init: bool = False,
    size: int = 224,
    frozen_patch: bool = True,
) -> nn.Module:
    """Return the backbone of that name, random weights from torch's current seed; `features` are its outputs.

    stem, width, bn and zero_init are of ResNets; size and frozen_patch of transformers.
    """
    if arch in VITS:
        return vit(arch, size=size, frozen_patch=frozen_patch)
    norm, _ = norm_layers(bn, groups)
    return resnet(arch, stem=stem, width=width, norm=norm, zero_init=zero_init)


def build_encoder(
    base: Base, backbone: nn.Module, *, dim: int, hidden: int | None, bn: BatchNormKind, groups: int
) -> Encoder:
    """Return the online encoder of `base`: the backbone and heads to `dim` dimensions."""
    _, norm = norm_layers(bn, groups)
    transformer = isinstance(backbone, VisionTransformer)
    projector, predictor = base.heads(backbone.features, hidden, dim, norm, transformer)
    return Encoder(backbone, projector, predictor, joint=base.joint)
