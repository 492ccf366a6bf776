"""What there is to choose from, by name. A new method is a file and a line here."""

from __future__ import annotations

from methods.encoders import ResNet, Stem, resnet
from methods.heads import Encoder, moco_v2_head
from methods.norm import GROUPS, BatchNormKind, norm_layer

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
METHODS = ("moco_v2",)
HEADS = {"moco_v2": moco_v2_head}


def build_backbone(arch: str, stem: Stem, width: float, bn: BatchNormKind, groups: int = GROUPS) -> ResNet:
    """Return the backbone of that name, random weights from torch's current seed."""
    return resnet(arch, stem=stem, width=width, norm=norm_layer(bn, groups))


def build_encoder(
    method: str, arch: str, stem: Stem, width: float, dim: int, bn: BatchNormKind, groups: int = GROUPS
) -> Encoder:
    """Return the online encoder of `method`: backbone and head to `dim` dimensions."""
    backbone = build_backbone(arch, stem, width, bn, groups)
    return Encoder(backbone, HEADS[method](backbone.features, dim))
