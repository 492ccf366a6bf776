"""Encoders from files: Millrace's checkpoints, the official MoCo v1, v2 and v3's, state dicts of other libraries.

The keys of a file decide its kind. Every backbone key must be present, in its shape, and unused keys are listed: a
partly loaded encoder still gives features, but poor ones (facebookresearch/moco issue 126: 45 instead of 67.5).
Only tensors are unpickled.
"""

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

from engine.weights.key_maps import to_ours
from engine.weights.readers import read, unwrapped
from methods.encoders import RESNETS, STEMS, Bottleneck, ResNet, Stem, base_channels
from methods.vit import PATCH, VITS, VisionTransformer
from pipeline.augment.center_crop import CenterCrop
from pipeline.augment.color import IMAGENET, Statistics
from pipeline.system.errors import InputError
from pipeline.system.text import printable

Which = Literal["online", "momentum"]
Backbone = ResNet | VisionTransformer
_COUNTER = "num_batches_tracked"  # may be missing in older files: unused
_RESNETS = {**RESNETS, "resnet152": (Bottleneck, (3, 8, 36, 3))}
TRANSFORMERS = {"vit_tiny": (192, 12, 3), **VITS, "vit_large": (1024, 24, 16)}
"""Feature dimensions, depths and attention heads, by name."""
_OTHER_HEADS = {"vit_small": 6}  # heads in timm, DeiT and DINO, with the same shapes as MoCo v3's 12


class _Layout(NamedTuple):
    """Key prefixes of the encoders in a kind of file."""

    name: str
    online: str
    momentum: str | None
    heads: int | None = None
    """Attention heads of a small transformer, if the kind decides them."""
    pretraining: bool = True
    """Whether the file has projection heads and other encoders or a queue."""
    projectors: tuple[tuple[str, str], ...] = ()
    """Prefixes of the online and the momentum encoder's projector: one of these pairs."""
    predictor: str = ""
    """Prefix of the predictor; empty: there is none."""


_LAYOUTS = (
    _Layout("a Millrace checkpoint", "online.backbone.", "target.backbone.", 12,
            projectors=(("online.projector.", "target.projector."),), predictor="online.predictor."),
    _Layout("an official MoCo v1 or v2 checkpoint", "encoder_q.", "encoder_k.",
            projectors=(("encoder_q.fc.", "encoder_k.fc."),)),
    _Layout("an official MoCo v3 checkpoint", "base_encoder.", "momentum_encoder.", 12,
            projectors=tuple((f"base_encoder.{head}.", f"momentum_encoder.{head}.") for head in ("fc", "head")),
            predictor="predictor."),
    _Layout("an official SimSiam checkpoint", "encoder.", None,
            projectors=(("encoder.fc.", ""),), predictor="predictor."),
    _Layout("a state dict", "backbone.", None, pretraining=False),
    _Layout("a state dict", "", None, pretraining=False),
)  # fmt: skip
_HEADS = ("fc", "head", "heads", "classifier", "linear")
_MAX_WIDTH = 64
_MAX_CHARACTERS, _MAX_PARTS = 200, 20  # characters of a key, and keys listed, in messages
_FIRST = r"conv1\.weight|patch_embed\.proj\.weight|stem\.conv1\.weight|conv_proj\.weight"
_ROOTS = r"conv1\.|bn1\.|layer\d\.|cls_token$|pos_embed$|patch_embed\.|blocks\.|norm\."


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

    @property
    def transformer(self) -> bool:
        """Whether it is a transformer."""
        return self.arch.startswith("vit")

    def build(self) -> Backbone:
        """Return the backbone with random weights, all of it trainable."""
        if self.transformer:
            dim, depth, _ = TRANSFORMERS[self.arch]
            return VisionTransformer(dim, depth, self.heads, size=self.size, stop_grad_conv1=False)
        return ResNet(*_RESNETS[self.arch], stem=self.stem, width=self.width)

    def __str__(self) -> str:
        if self.transformer:
            return f"{self.arch} of {self.heads} heads for {self.size} pixels"
        more = [f"width {self.width:g}"] * (self.width != 1) + [f"{self.stem} stem"] * (self.stem != "imagenet")
        return f"{self.arch} ({', '.join(more)})" if more else self.arch


class SkipInit(TorchFunctionMode):
    """Skips random initialization, which costs time, for a network whose weights are all loaded. Draws nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (args or [kwargs["tensor"]])[0] if func in _INITIALIZERS else func(*args, **kwargs)


_INITIALIZERS: set[Any] = {torch.Tensor.uniform_, torch.Tensor.normal_}
_INITIALIZERS |= {nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}


@dataclass
class LoadedEncoder:
    """A backbone and its source."""

    backbone: Backbone
    architecture: Architecture
    path: Path
    kind: str
    """Kind of file, in words."""
    which: Which
    matched: int
    """Backbone keys in the file: all, except counters of batches."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the run, for a Millrace checkpoint."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Provenance of that run, if recorded (`engine.checkpoint.provenance`)."""
    unused: dict[str, int] = field(default_factory=dict)
    """Number of unused keys, by part of the network."""
    heads: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """State dicts of `projector` and `predictor`, as far as the file has them."""
    statistics: Statistics = IMAGENET
    """Mean and standard deviation for normalization of its images."""
    warnings: list[str] = field(default_factory=list)

    @property
    def preprocess(self) -> CenterCrop:
        """From an image to the backbone's input [3, S, S]: the center crop that the run's kNN evaluated."""
        crop_ratio = float(self.settings.get("data", {}).get("eval_crop_ratio", 0.875))
        return CenterCrop(self.architecture.size, crop_ratio, self.statistics)

    def summary(self) -> str:
        """Return a line with the numbers of matched and unused keys."""
        total, parts = len(self.backbone.state_dict()), list(self.unused.items())[:_MAX_PARTS]
        unused = ", ".join(f"{part[:_MAX_CHARACTERS]} ({count})" for part, count in parts)
        return printable(
            f"{self.path}: {self.architecture}, {self.which} encoder of {self.kind}: {self.matched} of {total} "
            f"backbone keys matched{f'; not used: {unused}' if unused else ''}"
        )


def load_encoder(path: Path | str, which: Which = "online", *, heads: int = 0, prefix: str = "") -> LoadedEncoder:
    """Return the backbone in a file or folder, in evaluation mode, on the CPU, in float32.

    path: a Millrace run, checkpoint folder or exported file; .safetensors; or a file of torch.save. heads: of a
    transformer whose file lacks their number. prefix: of the backbone's keys, in a file of no known kind. Raises
    InputError for a missing key, a wrong shape, an impossible value, or an unsafe file.
    """
    contents = read(Path(path))
    path = contents.path
    layout, part = _find_layout(contents.state, path, unwrapped(prefix))
    of_which = layout.online if which == "online" else layout.momentum
    if of_which is None:
        raise InputError(f"{path}: is {layout.name}, of one encoder: choose the online one")
    if which == "momentum":
        part = to_ours(_strip(contents.state, of_which))
        if not part:
            raise InputError(f"{path}: has no momentum encoder ({of_which}...): choose the online one")
    if path.is_file() and sum(value.nbytes for value in part.values()) > path.stat().st_size:
        raise InputError(f"{path}: its tensors are larger than the file by their shapes: save them with all values")
    try:
        if any(key.startswith("layer") for key in part):
            architecture = _resnet_architecture(part, contents.described, path)
        else:
            architecture = _transformer_architecture(part, contents.described, heads, layout, path)
    except InputError:
        raise
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: shapes that no encoder here has ({error}): give another file") from None
    statistics = _statistics(contents.described, path)
    with torch.device("meta"):  # shapes alone: nothing is allocated before the file proves to contain it
        expected = architecture.build().state_dict()
    _check(part, expected, path, of_which)
    with SkipInit():
        backbone = architecture.build()
    backbone.load_state_dict(part, strict=False)
    matched = len(expected.keys() & part.keys())
    loaded = LoadedEncoder(
        backbone.eval(), architecture, path, layout.name, which, matched, contents.settings, contents.origin
    )
    loaded.heads = _find_heads(contents.state, layout, which)
    loaded.statistics = statistics
    _note_unused(loaded, layout, part, [key for key in contents.state if not key.startswith(of_which)])
    return loaded


def _statistics(stated: dict[str, Any], path: Path) -> Statistics:
    """Return the mean and standard deviation that the file states, or ImageNet's. Raises InputError for wrong ones."""
    mean, std = (stated.get(name) or default for name, default in IMAGENET._asdict().items())
    try:
        (mean_r, mean_g, mean_b), (std_r, std_g, std_b) = map(float, mean), map(float, std)
        statistics = Statistics((mean_r, mean_g, mean_b), (std_r, std_g, std_b))
    except (TypeError, ValueError, OverflowError):
        statistics = Statistics((math.nan,) * 3, (math.nan,) * 3)
    if not all(0 <= value <= 1 for value in (*statistics.mean, *statistics.std)) or min(statistics.std) == 0:
        raise InputError(f"{path}: its mean and std are not three numbers from 0 to 1 each: give another file")
    return statistics


def digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, with their names."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _strip(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the part of a state under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _find_layout(state: dict[str, torch.Tensor], path: Path, prefix: str) -> tuple[_Layout, dict[str, torch.Tensor]]:
    """Return the layout, and the online encoder's part under our names."""
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    given = _Layout(f"a state dict with the prefix {prefix}", prefix, None, pretraining=False)
    for layout in (given,) if prefix else _LAYOUTS:
        part = to_ours(_strip(state, layout.online))
        if any(re.match(_ROOTS, key) for key in part):
            return layout, part
    content = f"its keys are {_list_keys(list(state)[:3], '')} ..." if state else "it contains no tensors"
    if prefixes := _prefixes(state):
        content += f"; prefixes of such keys: {', '.join(prefixes[:_MAX_PARTS])}"
    where = f" under {prefix}" if prefix else ""
    raise InputError(
        f"{path}: no backbone of a ResNet or a vision transformer{where} ({content}): give one with such keys, or "
        "their prefix"
    )


def _prefixes(state: Iterable[str]) -> list[str]:
    """Return the prefixes of the keys of a backbone's first layer, not of its blocks."""
    matches = (re.fullmatch(rf"(.+\.)({_FIRST})", key[:_MAX_CHARACTERS]) for key in state)
    prefixes = dict.fromkeys(match[1] for match in matches if match)
    return [prefix for prefix in prefixes if not re.search(r"(layer|stage|res|block)s?\d*\.", prefix)]


def _find_heads(state: dict[str, torch.Tensor], layout: _Layout, which: Which) -> dict[str, dict[str, torch.Tensor]]:
    """Return the state dicts of the heads in the file; the projector is that of the encoder `which`."""
    prefixes = [("projector", pair[which == "momentum"]) for pair in layout.projectors]
    prefixes.append(("predictor", layout.predictor))
    parts = [(name, _strip(state, prefix)) for name, prefix in prefixes if prefix]
    return {name: part for name, part in parts if part}


def _resnet_architecture(part: dict[str, torch.Tensor], stated: dict[str, Any], path: Path) -> Architecture:
    """Return the architecture that the file states, or that its keys and shapes show."""
    conv1 = _get("conv1.weight", part, path)
    stem: Stem = next((stem for stem, (kernel, _) in STEMS.items() if kernel == conv1.shape[-1]), "imagenet")
    arch, channels = _resnet_name(part, path), conv1.shape[0]
    width = float(stated.get("width", channels / 64))  # narrow networks round the channels: ask the file first
    if not 0 < width <= _MAX_WIDTH or base_channels(width) != channels:
        raise ValueError(f"width {width:g}")
    return Architecture(arch, stem, width, _size(int(stated.get("size", 224))))


def _transformer_architecture(
    part: dict[str, torch.Tensor], stated: dict[str, Any], heads: int, layout: _Layout, path: Path
) -> Architecture:
    """Return the architecture by keys and shapes, with the heads of the command line, the file, or its kind."""
    dim = _get("cls_token", part, path).shape[-1]
    name = next((name for name, (known, _, _) in TRANSFORMERS.items() if known == dim), "")
    _, depth, default = TRANSFORMERS.get(name, (0, 0, 0))
    tokens = _get("pos_embed", part, path).shape[1]
    side = math.isqrt(max(tokens - 1, 0))
    blocks = len({key.split(".")[1] for key in part if key.startswith("blocks.")})
    if not name or blocks != depth or side**2 != tokens - 1:
        known = ", ".join(sorted(TRANSFORMERS))
        raise InputError(
            f"{path}: a transformer of {dim} dimensions, {blocks} blocks and {tokens} tokens: known are {known}, of "
            f"patches of {PATCH} pixels"
        )
    count = heads or int(stated.get("heads", 0)) or layout.heads
    if name in _OTHER_HEADS and not count:
        raise InputError(
            f"{path}: {name} has {default} heads in MoCo v3 and {_OTHER_HEADS[name]} in timm, DeiT and DINO, and the "
            "file does not say: give --heads"
        )
    count = count or default
    if count < 1 or dim % count:
        raise InputError(f"{path}: {count} heads do not divide {dim} dimensions: give other --heads")
    return Architecture(name, size=_size(side * PATCH), heads=count)


def _size(pixels: int) -> int:
    if not 8 <= pixels <= 1024:
        raise ValueError(f"images of {pixels} pixels")
    return pixels


def _resnet_name(part: dict[str, torch.Tensor], path: Path) -> str:
    """Return the name of the ResNet with these blocks."""
    bottleneck = any(re.fullmatch(r"layer1\.\d+\.conv3\.weight", key) for key in part)
    depths = tuple(
        len({match[1] for key in part if (match := re.match(rf"layer{stage}\.(\d+)\.", key))}) for stage in range(1, 5)
    )
    for name, (block, known) in _RESNETS.items():
        if known == depths and bottleneck == (block is Bottleneck):
            return name
    raise InputError(
        f"{path}: {list(depths)} {'bottleneck' if bottleneck else 'basic'} blocks are none of {', '.join(_RESNETS)}: "
        "keys are missing, or it is another network"
    )


def _get(key: str, part: dict[str, torch.Tensor], path: Path) -> torch.Tensor:
    if key not in part:
        raise InputError(f"{path}: {key} of the backbone is missing: give the complete encoder")
    return part[key]


def _check(part: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path, prefix: str) -> None:
    """Raise InputError for missing keys, wrong shapes, non-finite values and negative variances."""
    missing = [key for key in expected if key not in part and not key.endswith(_COUNTER)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(expected)} backbone keys are missing: {_list_keys(missing, prefix)}: give "
            "the complete encoder"
        )
    wrong = [key for key, like in expected.items() if key in part and part[key].shape != like.shape]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"{path}: {len(wrong)} backbone keys have shapes of other layers: {prefix}{key} is "
            f"{list(part[key].shape)}, not {list(expected[key].shape)}: its keys are in disorder, or of another network"
        )
    for key in expected:
        values = part.get(key)
        if values is None or not values.is_floating_point():
            continue
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():  # NaN passes through both
            raise InputError(f"{path}: {prefix}{key} has non-finite values: give another checkpoint")
        if key.endswith("running_var") and (values < 0).any():
            raise InputError(f"{path}: {prefix}{key} has negative variances: its keys are in disorder")


def _list_keys(keys: list[str], prefix: str) -> str:
    """Return the first keys as text, shortened."""
    return ", ".join((prefix + key)[:_MAX_CHARACTERS] for key in keys[:4]) + (" ..." if len(keys) > 4 else "")


def _note_unused(loaded: LoadedEncoder, layout: _Layout, part: dict[str, torch.Tensor], others: Iterable[str]) -> None:
    """Count the unused keys, and warn of keys that a pretrained encoder would not have."""
    known = loaded.backbone.state_dict().keys()
    unused = [key for key in part if key not in known]
    of_heads = [key for key in unused if key.split(".")[0] in _HEADS]
    unknown = [key for key in unused if key.split(".")[0] not in _HEADS]
    warnings = []
    if of_heads and not layout.pretraining:
        names = ", ".join(f"{key[:_MAX_CHARACTERS]} {list(part[key].shape)}" for key in of_heads[:4])
        warnings.append(
            f"{loaded.path}: {names}: the head of a classifier, left out: the encoder may have been trained with labels"
        )
    if unknown:
        keys = _list_keys(unknown, "")
        warnings.append(f"{loaded.path}: keys that no {loaded.architecture.arch} has: {keys}")
    loaded.warnings = [printable(warning) for warning in warnings]
    label = "projection head" if layout.pretraining else "head"
    loaded.unused = Counter(f"{label} {key.split('.')[0]}.*" for key in of_heads)
    loaded.unused |= Counter(f"{key.split('.')[0]}.*" if "." in key else key for key in others)
    loaded.unused |= {"others": len(unknown)} if unknown else {}
