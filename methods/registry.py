"""Base methods, architectures and terms by name. A new one is a file, and a line here."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from methods import byol, moco, mocov3, simclr
from methods.base import Base, Objective
from methods.co2 import CO2
from methods.custom import CustomBackbone, build_custom, is_custom
from methods.dcl import DCL
from methods.encoders import ResNet, Stem, resnet
from methods.heads import Encoder
from methods.norm import GROUPS, BatchNormKind, norm_layers
from methods.residual import Residual
from methods.vit import VITS, VisionTransformer, vit
from methods.xmoco import XMoCo

BASES: dict[str, Base] = {base.name: base for base in (moco.V1, moco.V2, mocov3.V3, simclr.SIMCLR, byol.BYOL_BASE)}


@dataclass(frozen=True)
class Terms:
    """Regularizers added to the base's own loss; null leaves one out."""

    co2: CO2 | None = None
    """Consistency of the similarities to the negatives (2010.02217)."""
    xmoco: XMoCo | None = None
    """Cross-similarity consistency and uniformity (2206.04676)."""
    residual: Residual | None = None
    """Student-teacher gap on one view (2211.09861)."""
    dcl: DCL | None = None
    """Decoupled InfoNCE instead of the base's own loss (2110.06848)."""


def build_objective(base: Base, terms: Terms) -> Objective:
    """Return the base's loss with these terms. Raises IncompatibleTerm."""
    by_name = {field.name: getattr(terms, field.name) for field in fields(terms)}
    return Objective(base, base.loss(), {name: term for name, term in by_name.items() if term is not None})


Backbone = ResNet | VisionTransformer | CustomBackbone


def build_backbone(
    arch: str,
    *,
    args: Mapping[str, Any] | None = None,
    stem: Stem = "imagenet",
    width: float = 1.0,
    bn: BatchNormKind = "plain",
    groups: int = GROUPS,
    zero_init_residual: bool = False,
    size: int = 224,
    stop_grad_conv1: bool = True,
) -> Backbone:
    """Return the backbone of that name, weights drawn by torch's global generator. `features`: its output dimensions.

    ResNets take stem, width, bn, groups and zero_init_residual; transformers bn, groups, size and stop_grad_conv1;
    those of timm and the user's own take args, bn, groups and size, and may raise BackboneError.
    """
    norm = norm_layers(bn, groups)
    if is_custom(arch):
        return build_custom(arch, args or {}, norm=norm, size=size)
    if arch in VITS:
        return vit(arch, size=size, stop_grad_conv1=stop_grad_conv1, norm=norm)
    return resnet(arch, stem=stem, width=width, norm=norm, zero_init_residual=zero_init_residual)


def build_encoder(
    base: Base, backbone: Backbone, *, dim: int, mlp_dim: int | None, bn: BatchNormKind, groups: int
) -> Encoder:
    """Return the online encoder of `base`: the backbone with heads to `dim` dimensions."""
    norm = norm_layers(bn, groups)
    transformer = backbone.transformer
    projector, predictor = base.heads(backbone.features, mlp_dim, dim, norm, transformer)
    return Encoder(backbone, projector, predictor, joint=base.joint)
