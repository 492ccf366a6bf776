"""Encoders from files: Millrace's checkpoints, the official MoCo v1, v2 and v3's, state dicts of other libraries.

They are told apart by their keys. Every key of the backbone has to be there, in its shape, and what is left over is
named: an encoder that was loaded in part still gives features, only poor ones (facebookresearch/moco issue 126: 45 in
place of 67.5). Nothing is unpickled but tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.weights.key_maps import ours
from engine.weights.readers import Contents, read
from methods.encoders import RESNETS, BasicBlock, Bottleneck, ResNet, Stem, base_channels
from methods.vit import PATCH, VITS, VisionTransformer
from pipeline.system.errors import InputError
from pipeline.system.text import printable

Which = Literal["online", "momentum"]
_COUNTER = "num_batches_tracked"  # which older files lack, and nothing is computed from
_DEPTHS = {name: depths for name, (_, depths) in RESNETS.items()} | {"resnet152": (3, 8, 36, 3)}
_TRANSFORMERS = {192: ("vit_tiny", 12, 3), 1024: ("vit_large", 24, 16)}  # dim to name, depth, heads
_TRANSFORMERS |= {dim: (name, depth, heads) for name, (dim, depth, heads) in VITS.items()}
DIMENSIONS = {name: dim for dim, (name, _, _) in _TRANSFORMERS.items()}
"""Of the transformers' features."""
_OTHER_HEADS = {"vit_small": 6}  # timm's, DeiT's and DINO's, of the same shapes as MoCo v3's of 12


class _Layout(NamedTuple):
    """How a kind of file names its encoders."""

    name: str
    online: str
    momentum: str | None
    heads: int | None = None
    """Of a small transformer, where the kind decides it."""
    pretraining: bool = True
    """Its heads are projections, and other encoders or a queue stand beside."""


_LAYOUTS = (
    _Layout("a Millrace checkpoint", "online.backbone.", "target.backbone.", heads=12),
    _Layout("an official MoCo v1 or v2 checkpoint", "encoder_q.", "encoder_k."),
    _Layout("an official MoCo v3 checkpoint", "base_encoder.", "momentum_encoder.", heads=12),
    _Layout("a state dict", "backbone.", None, pretraining=False),
    _Layout("a state dict", "", None, pretraining=False),
)
_WIDEST = 64
_SHOWN, _PARTS = 200, 20  # characters of a key, and parts, that are told of
_ROOTS = r"conv1\.|bn1\.|layer\d\.|cls_token$|pos_embed$|patch_embed\.|blocks\.|norm\."


@dataclass(frozen=True)
class Architecture:
    """What a backbone's weights do not say by themselves, or only by their shapes."""

    arch: str
    stem: Stem = "imagenet"
    width: float = 1.0
    size: int = 224
    """Side of the images, pixels: fixed for a transformer, that of pretraining for a ResNet, where it is known."""
    heads: int = 0
    """Of a transformer."""

    @property
    def transformer(self) -> bool:
        """Whether it is a transformer."""
        return self.arch.startswith("vit")

    def build(self) -> nn.Module:
        """Return the backbone with random weights, all of it trainable."""
        if self.transformer:
            dim, depth = next((dim, depth) for dim, (name, depth, _) in _TRANSFORMERS.items() if name == self.arch)
            return VisionTransformer(dim, depth, self.heads, size=self.size, stop_grad_conv1=False)
        block = BasicBlock if self.arch in ("resnet18", "resnet34") else Bottleneck
        depths: tuple[int, int, int, int] = _DEPTHS[self.arch]  # type: ignore[assignment]
        return ResNet(block, depths, stem=self.stem, width=self.width)

    def __str__(self) -> str:
        if self.transformer:
            return f"{self.arch} of {self.heads} heads for {self.size} pixels"
        more = [f"width {self.width:g}"] * (self.width != 1) + ["small stem"] * (self.stem == "small")
        return f"{self.arch} ({', '.join(more)})" if more else self.arch


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of random weights: for a network of which every weight is loaded, and no draw is taken."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (args or [kwargs["tensor"]])[0] if func in _DRAWS else func(*args, **kwargs)


_DRAWS = {torch.Tensor.uniform_, torch.Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}


@dataclass
class Loaded:
    """A backbone and where it came from."""

    backbone: nn.Module
    architecture: Architecture
    path: Path
    kind: str
    """What the file is, in words."""
    which: Which
    matched: int
    """Keys of the backbone that were in the file: all of them, but for counters of batches."""
    left: dict[str, int] = field(default_factory=dict)
    """Keys that were not used, by the part they are of."""
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run, where it is a Millrace checkpoint."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What that run was made by, as far as the checkpoint says (`engine.checkpoint.provenance`)."""

    def summary(self) -> str:
        """Return in a line what was matched and what is left over."""
        total = len(self.backbone.state_dict())
        left = ", ".join(f"{part[:_SHOWN]} ({count})" for part, count in list(self.left.items())[:_PARTS])
        return printable(
            f"{self.path}: {self.architecture}, {self.which} encoder of {self.kind}: {self.matched} of {total} "
            f"backbone keys matched{f'; not used: {left}' if left else ''}"
        )


def load_encoder(path: Path | str, which: Which = "online", *, heads: int = 0) -> Loaded:
    """Return the backbone in the file or folder at `path`, in evaluation mode, on the CPU, in float32.

    path: a Millrace run, checkpoint folder or exported file; .safetensors; or what torch.save wrote. heads: of a
    transformer whose file does not say. Raises InputError where a key is missing, has another shape or an impossible
    value, or the file is not to be trusted.
    """
    path = Path(path)
    contents = read(path)
    path = contents.path
    layout, part = _layout_of(contents.state, path)
    prefix = layout.online if which == "online" else layout.momentum
    if prefix is None:
        raise InputError(f"{path}: is {layout.name}, of one encoder: leave out --which momentum")
    if which == "momentum":
        part = ours(_within(contents.state, prefix))
        if not part:
            raise InputError(f"{path}: has no momentum encoder ({prefix}...): leave out --which momentum")
    if path.is_file() and sum(value.nbytes for value in part.values()) > path.stat().st_size:
        raise InputError(f"{path}: its tensors are larger than the file by their shapes: have them saved whole")
    architecture = _architecture(part, layout, contents, heads, path)
    with torch.device("meta"):  # shapes alone: what is built has to be in the file first
        wanted = architecture.build().state_dict()
    _check(part, wanted, path, prefix)
    with _Undrawn():
        backbone = architecture.build()
    backbone.load_state_dict(part, strict=False)
    matched = len(wanted.keys() & part.keys())
    loaded = Loaded(backbone.eval(), architecture, path, layout.name, which, matched)
    loaded.settings, loaded.origin = contents.settings, contents.origin
    _tell_left(loaded, layout, part, [key for key in contents.state if not key.startswith(prefix)])
    return loaded


def digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers: of two modules the same only where every bit is."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _within(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _layout_of(state: dict[str, torch.Tensor], path: Path) -> tuple[_Layout, dict[str, torch.Tensor]]:
    """Return the layout, and the online encoder's part under our names."""
    for layout in _LAYOUTS:
        part = ours(_within(state, layout.online))
        if any(re.match(_ROOTS, key) for key in part):
            return layout, part
    have = f"its keys are {_some(list(state)[:3], '')} ..." if state else "there are no tensors in it"
    raise InputError(f"{path}: no backbone of a ResNet or a vision transformer ({have}): give one with such keys")


def _architecture(
    part: dict[str, torch.Tensor], layout: _Layout, contents: Contents, heads: int, path: Path
) -> Architecture:
    """Return the architecture that the file states, or that its keys and shapes show."""
    stated = contents.described
    try:
        if any(key.startswith("layer") for key in part):
            stem: Stem = "small" if _of("conv1.weight", part, path).shape[-1] == 3 else "imagenet"
            shown = Architecture(_resnet_of(part, path), stem, part["conv1.weight"].shape[0] / 64)
            width = float(stated.get("width", shown.width))  # of 8 channels at least, whatever the share
            if not 0 < width <= _WIDEST or base_channels(width) != part["conv1.weight"].shape[0]:
                raise ValueError(f"width {width:g}")
            return Architecture(shown.arch, stem, width, _size(int(stated.get("size", 224))))
        name, depth, usual = _TRANSFORMERS.get(_of("cls_token", part, path).shape[-1], ("", 0, 0))
        tokens = _of("pos_embed", part, path).shape[1]
        side = math.isqrt(max(tokens - 1, 0))
        blocks = len({key.split(".")[1] for key in part if key.startswith("blocks.")})
        if not name or blocks != depth or side**2 != tokens - 1:
            known = ", ".join(sorted(name for name, _, _ in _TRANSFORMERS.values()))
            raise InputError(
                f"{path}: a transformer of {part['cls_token'].shape[-1]} dimensions, {blocks} blocks and {tokens} "
                f"tokens: known are {known}, of patches of {PATCH} pixels"
            )
        count = heads or int(stated.get("heads", 0)) or layout.heads or usual
        if name in _OTHER_HEADS and not (heads or stated.get("heads") or layout.heads):
            raise InputError(
                f"{path}: {name} has {usual} heads in MoCo v3 and {_OTHER_HEADS[name]} in timm, DeiT and DINO, and the "
                "file does not say: give --heads"
            )
        if count < 1 or DIMENSIONS[name] % count:
            raise InputError(f"{path}: {count} heads do not divide {DIMENSIONS[name]} dimensions: give other --heads")
        return Architecture(name, size=_size(side * PATCH), heads=count)
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: shapes that no encoder here has ({error}): give another file") from None


def _size(pixels: int) -> int:
    if not 8 <= pixels <= 1024:
        raise ValueError(f"images of {pixels} pixels")
    return pixels


def _resnet_of(part: dict[str, torch.Tensor], path: Path) -> str:
    """Return the name of the ResNet that has those blocks."""
    bottleneck = any(re.fullmatch(r"layer1\.\d+\.conv3\.weight", key) for key in part)
    depths = tuple(
        len({match[1] for key in part if (match := re.match(rf"layer{stage}\.(\d+)\.", key))}) for stage in range(1, 5)
    )
    for name, known in _DEPTHS.items():
        if known == depths and bottleneck != (name in ("resnet18", "resnet34")):
            return name
    raise InputError(
        f"{path}: {list(depths)} {'bottleneck' if bottleneck else 'basic'} blocks, which is none of "
        f"{', '.join(_DEPTHS)}: keys are missing, or it is another network"
    )


def _of(key: str, part: dict[str, torch.Tensor], path: Path) -> torch.Tensor:
    if key not in part:
        raise InputError(f"{path}: {key} of the backbone is missing: give the whole encoder")
    return part[key]


def _check(part: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: Path, prefix: str) -> None:
    """Refuse a backbone of which keys are missing, have other shapes, or hold what no encoder holds."""
    missing = [key for key in wanted if key not in part and not key.endswith(_COUNTER)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(wanted)} backbone keys are missing: {_some(missing, prefix)}: give the "
            "whole encoder"
        )
    wrong = [key for key, like in wanted.items() if key in part and part[key].shape != like.shape]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"{path}: {len(wrong)} backbone keys have shapes of other layers: {prefix}{key} is "
            f"{list(part[key].shape)}, not {list(wanted[key].shape)}: its keys are in disorder, or of another network"
        )
    for key in wanted:
        values = part.get(key)
        if values is None or not values.is_floating_point():
            continue
        if not values.isfinite().all():
            raise InputError(f"{path}: {prefix}{key} holds numbers that are not finite: give another checkpoint")
        if key.endswith("running_var") and (values < 0).any():
            raise InputError(f"{path}: {prefix}{key} holds negative variances: its keys are in disorder")


def _some(keys: list[str], prefix: str) -> str:
    return ", ".join((prefix + key)[:_SHOWN] for key in keys[:4]) + (" ..." if len(keys) > 4 else "")


def _tell_left(loaded: Loaded, layout: _Layout, part: dict[str, torch.Tensor], others: Iterable[str]) -> None:
    """Note the keys that were not used, and warn of those that a pretrained encoder would not have."""
    known = loaded.backbone.state_dict().keys()
    beside = [key for key in part if key not in known]
    own = Counter(key.split(".")[0] for key in beside)
    heads = {name: count for name, count in own.items() if name in ("fc", "head", "heads", "classifier", "linear")}
    strange = [key for key in beside if key.split(".")[0] not in heads]
    if heads and not layout.pretraining:
        names = [f"{key[:_SHOWN]} {list(part[key].shape)}" for key in beside if key.split(".")[0] in heads]
        loaded.warnings.append(
            f"{loaded.path}: {', '.join(names[:4])}: the head of a classifier, left out: this encoder may have been "
            "trained with labels"
        )
    if strange:
        loaded.warnings.append(f"{loaded.path}: keys that no {loaded.architecture.arch} has: {_some(strange, '')}")
    loaded.warnings = [printable(warning) for warning in loaded.warnings]
    label = "projection head" if layout.pretraining else "head"
    parts = {f"{label} {name}.*": count for name, count in heads.items()}
    parts |= Counter(f"{key.split('.')[0]}.*" if "." in key else key for key in others)
    loaded.left = parts | ({"others": len(strange)} if strange else {})
