"""Architecture of a backbone, as a file states it or as its keys and shapes show."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from methods.custom import READING, BackboneError, build_custom, is_custom
from methods.encoders import RESNETS, STEMS, BasicBlock, Bottleneck, ResNet, Stem, WideBottleneck, base_channels
from methods.registry import Backbone
from methods.vit import PATCH, VITS, VisionTransformer
from pipeline.system.errors import InputError

State = dict[str, torch.Tensor]
_OTHER_HEADS = {"vit_small": 6}  # heads in timm, DeiT and DINO, with the same shapes as MoCo v3's 12
_MAX_WIDTH = 64


@dataclass(frozen=True)
class Architecture:
    """Architecture of a backbone: shapes alone do not determine it."""

    arch: str
    stem: Stem = "imagenet"
    width: float = 1.0
    size: int = 224
    """Side of the images, pixels: fixed for a transformer; for a ResNet that of pretraining, if known."""
    heads: int = 0
    """Attention heads of a transformer."""
    args: dict[str, Any] | None = None
    """Arguments of a backbone of timm or of the user's code."""

    @property
    def transformer(self) -> bool:
        """Whether it is one of our transformers."""
        return self.arch in VITS

    @property
    def custom(self) -> bool:
        """Whether it is of timm or of the user's code."""
        return is_custom(self.arch)

    @property
    def own_args(self) -> dict[str, Any]:
        """`args` without those that would fetch or read other weights."""
        return {key: value for key, value in (self.args or {}).items() if key not in {"pretrained", *READING}}

    def build(self) -> Backbone:
        """Return the backbone with random weights, all of ours trainable. Raises InputError for one of other code."""
        if self.custom:
            try:
                return build_custom(self.arch, self.own_args, size=self.size)
            except BackboneError as error:
                raise InputError(f"{self.arch}: {error}") from error.__cause__
        if self.transformer:
            dim, depth, _, conv_stem = VITS[self.arch]
            return VisionTransformer(dim, depth, self.heads, size=self.size, stop_grad_conv1=False, conv_stem=conv_stem)
        return ResNet(*RESNETS[self.arch], stem=self.stem, width=self.width)

    def __str__(self) -> str:
        if self.custom:
            args = ", ".join(f"{key}={value!r}" for key, value in (self.args or {}).items())
            return f"{self.arch}({args})" if args else self.arch
        if self.transformer:
            return f"{self.arch} of {self.heads} heads for {self.size} pixels"
        more = [f"width {self.width:g}"] * (self.width != 1) + [f"{self.stem} stem"] * (self.stem != "imagenet")
        return f"{self.arch} ({', '.join(more)})" if more else self.arch


def resnet_architecture(part: State, stated: dict[str, Any], path: Path) -> Architecture:
    """Return the architecture that the file states, or that its keys and shapes show.

    Raises InputError, or ValueError and the like for shapes that no ResNet has.
    """
    conv1 = _get("conv1.weight", part, path)
    stem: Stem = next((stem for stem, (kernel, _) in STEMS.items() if kernel == conv1.shape[-1]), "imagenet")
    arch, channels = _resnet_name(part, path), conv1.shape[0]
    width = float(stated.get("width", channels / 64))  # narrow networks round the channels: ask the file first
    if not 0 < width <= _MAX_WIDTH or base_channels(width) != channels:
        raise ValueError(f"width {width:g}")
    return Architecture(arch, stem, width, checked_size(int(stated.get("size", 224))))


def transformer_architecture(
    part: State, stated: dict[str, Any], heads: int, published_heads: bool, path: Path
) -> Architecture:
    """Return the architecture by keys and shapes, with the heads of the command line, the file, or its kind.

    published_heads: whether the kind of file has MoCo v3's number of them. Raises InputError, or ValueError and the
    like for shapes that no transformer has.
    """
    dim, conv_stem = _get("cls_token", part, path).shape[-1], "patch_embed.proj.0.weight" in part
    tokens = _get("pos_embed", part, path).shape[1]
    side = math.isqrt(max(tokens - 1, 0))
    blocks = len({key.split(".")[1] for key in part if key.startswith("blocks.")})
    name = next((name for name, s in VITS.items() if (s.dim, s.depth, s.conv_stem) == (dim, blocks, conv_stem)), "")
    if not name or side**2 != tokens - 1:
        known = ", ".join(VITS)
        raise InputError(
            f"{path}: a transformer of {dim} dimensions, {blocks} blocks and {tokens} tokens: known are {known}, of "
            f"patches of {PATCH} pixels"
        )
    default, count = VITS[name].heads, heads or int(stated.get("heads", 0))
    if name in _OTHER_HEADS and not (count or published_heads):
        raise InputError(
            f"{path}: {name} has {default} heads in MoCo v3 and {_OTHER_HEADS[name]} in timm, DeiT and DINO, and the "
            "file does not say: give --heads"
        )
    count = count or default
    if count < 1 or dim % count:
        raise InputError(f"{path}: {count} heads do not divide {dim} dimensions: give other --heads")
    return Architecture(name, size=checked_size(side * PATCH), heads=count)


def checked_size(pixels: int) -> int:
    """Return a side of images. Raises ValueError for one out of range."""
    if not 8 <= pixels <= 1024:
        raise ValueError(f"images of {pixels} pixels")
    return pixels


def _resnet_name(part: State, path: Path) -> str:
    """Return the name of the ResNet with these blocks."""
    block: type = BasicBlock
    if any(re.fullmatch(r"layer1\.\d+\.conv3\.weight", key) for key in part):
        inner, first = (len(part[key]) if key in part else 1 for key in ("layer1.0.conv1.weight", "conv1.weight"))
        block = WideBottleneck if inner == 2 * first else Bottleneck
    depths = tuple(
        len({match[1] for key in part if (match := re.match(rf"layer{stage}\.(\d+)\.", key))}) for stage in range(1, 5)
    )
    for name, known in RESNETS.items():
        if known == (block, depths):
            return name
    raise InputError(
        f"{path}: {list(depths)} {'basic' if block is BasicBlock else 'bottleneck'} blocks are none of "
        f"{', '.join(RESNETS)}: "
        "keys are missing, or it is another network"
    )


def _get(key: str, part: State, path: Path) -> torch.Tensor:
    if key not in part:
        raise InputError(f"{path}: {key} of the backbone is missing: give the complete encoder")
    return part[key]
