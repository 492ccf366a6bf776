"""Parameter names of other libraries, as renaming rules that work both ways.

Our ResNets have torchvision's names, as timm's and mmdetection's have; our transformers have timm's.
Sources: facebookresearch/moco `detection/convert-pretrain-to-detectron2.py` (detectron2's ResNet); torchvision
`models/vision_transformer.py`; open-mmlab/mmpretrain `backbones/vision_transformer.py` (mmdetection's transformer).
detectron2's transformer (ViTDet) has timm's names.
"""

import re
from typing import Literal

import torch

Library = Literal["torchvision", "timm", "detectron2", "mmdet"]
_Rules = tuple[tuple[str, str], ...]
_N = r"(\d+)"

_DETECTRON2_RESNET: _Rules = (
    (r"bn1\.(.+)", r"stem.conv1.norm.\1"),  # before the convolutions, whose reverse rules match it too
    (r"conv1\.(.+)", r"stem.conv1.\1"),
    *((rf"layer{n}\.{_N}\.downsample\.1\.(.+)", rf"res{n + 1}.\1.shortcut.norm.\2") for n in range(1, 5)),
    *((rf"layer{n}\.{_N}\.downsample\.0\.(.+)", rf"res{n + 1}.\1.shortcut.\2") for n in range(1, 5)),
    *((rf"layer{n}\.{_N}\.bn{_N}\.(.+)", rf"res{n + 1}.\1.conv\2.norm.\3") for n in range(1, 5)),
    *((rf"layer{n}\.{_N}\.conv{_N}\.(.+)", rf"res{n + 1}.\1.conv\2.\3") for n in range(1, 5)),
)
_TORCHVISION_VIT: _Rules = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.(.+)", r"conv_proj.\1"),
    (rf"blocks\.{_N}\.norm([12])\.(.+)", r"encoder.layers.encoder_layer_\1.ln_\2.\3"),
    (rf"blocks\.{_N}\.attn\.qkv\.(weight|bias)", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2"),
    (rf"blocks\.{_N}\.attn\.proj\.(.+)", r"encoder.layers.encoder_layer_\1.self_attention.out_proj.\2"),
    (rf"blocks\.{_N}\.mlp\.fc1\.(.+)", r"encoder.layers.encoder_layer_\1.mlp.0.\2"),
    (rf"blocks\.{_N}\.mlp\.fc2\.(.+)", r"encoder.layers.encoder_layer_\1.mlp.3.\2"),
    (r"norm\.(.+)", r"encoder.ln.\1"),
)
_MMDET_VIT: _Rules = (
    ("cls_token", "cls_token"),
    ("pos_embed", "pos_embed"),
    (r"patch_embed\.proj\.(.+)", r"patch_embed.projection.\1"),
    (rf"blocks\.{_N}\.norm([12])\.(.+)", r"layers.\1.ln\2.\3"),
    (rf"blocks\.{_N}\.attn\.(.+)", r"layers.\1.attn.\2"),
    (rf"blocks\.{_N}\.mlp\.fc1\.(.+)", r"layers.\1.ffn.layers.0.0.\2"),
    (rf"blocks\.{_N}\.mlp\.fc2\.(.+)", r"layers.\1.ffn.layers.1.\2"),
    (r"norm\.(.+)", r"ln1.\1"),
)
_RULES: dict[tuple[Library, bool], _Rules] = {
    ("detectron2", False): _DETECTRON2_RESNET,
    ("torchvision", True): _TORCHVISION_VIT,
    ("mmdet", True): _MMDET_VIT,
}


def to_library(state: dict[str, torch.Tensor], library: Library, *, transformer: bool) -> dict[str, torch.Tensor]:
    """Return our backbone's state under the library's names. Raises KeyError for a name without a rule."""
    rules = _RULES.get((library, transformer))
    return {_rename(rules, name): value for name, value in state.items()} if rules else dict(state)


def to_ours(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state of any library under our names. Names without a rule stay."""
    for (library, transformer), markers in _MARKERS.items():
        if any(marker in state for marker in markers):
            rules = tuple(_invert(rule) for rule in _RULES[library, transformer])
            return {_rename(rules, name, name): value for name, value in state.items()}
    return state


_MARKERS: dict[tuple[Library, bool], tuple[str, ...]] = {
    ("detectron2", False): ("stem.conv1.weight", "res2.0.conv1.weight"),
    ("torchvision", True): ("conv_proj.weight", "class_token"),
    ("mmdet", True): ("patch_embed.projection.weight", "layers.0.attn.qkv.weight"),
}
"""Names by which a library is recognized: any one of them."""


def _rename(rules: _Rules, name: str, default: str | None = None) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    if default is None:
        raise KeyError(name)
    return default


def _invert(rule: tuple[str, str]) -> tuple[str, str]:
    """Return the rule that undoes `rule`: each group, in order, is exchanged with the reference to it."""
    pattern, replacement = rule
    groups = re.findall(r"\([^)]*\)", pattern)
    inverse = re.escape(replacement)
    for number, group in enumerate(groups, start=1):
        inverse = inverse.replace(rf"\\{number}", group)
        pattern = pattern.replace(group, rf"\{number}", 1)
    return inverse, pattern.replace(r"\.", ".")
