"""Encoders from files: Millrace's checkpoints, the official MoCo v1, v2 and v3's, state dicts of other libraries.

The keys of a file decide its kind. Every backbone key must be present, in its shape, and unused keys are listed: a
partly loaded encoder still gives features, but poor ones (facebookresearch/moco issue 126: 45 instead of 67.5).
Only tensors are unpickled.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.weights.key_maps import to_ours
from engine.weights.readers import Contents, read, unwrapped
from methods.custom import READING, BackboneError, CustomBackbone, build_custom, build_timm, is_custom, needs_trust
from methods.encoders import RESNETS, STEMS, BasicBlock, Bottleneck, ResNet, Stem, WideBottleneck, base_channels
from methods.registry import Backbone
from methods.vit import PATCH, VITS, VisionTransformer
from pipeline.augment.center_crop import CenterCrop
from pipeline.augment.color import IMAGENET, Statistics
from pipeline.system.errors import InputError
from pipeline.system.text import printable

Which = Literal["online", "momentum"]
_COUNTER = "num_batches_tracked"  # may be missing in older files: unused
_OTHER_HEADS = {"vit_small": 6}  # heads in timm, DeiT and DINO, with the same shapes as MoCo v3's 12


class _Layout(NamedTuple):
    """Key prefixes of the encoders in a kind of file."""

    name: str
    online: str
    momentum: str | None
    published_heads: bool = False
    """Whether a small transformer has MoCo v3's 12 attention heads."""
    pretraining: bool = True
    """Whether the file has projection heads and other encoders or a queue."""
    projectors: tuple[tuple[str, str], ...] = ()
    """Prefixes of the online and the momentum encoder's projector: one of these pairs."""
    predictor: str = ""
    """Prefix of the predictor; empty: there is none."""
    marker: str = ""
    """Prefix of a key that every such file has."""


_LAYOUTS = (
    _Layout("a Millrace checkpoint", "online.backbone.", "target.backbone.", True,
            projectors=(("online.projector.", "target.projector."),), predictor="online.predictor."),
    _Layout("an official MoCo v1 or v2 checkpoint", "encoder_q.", "encoder_k.",
            projectors=(("encoder_q.fc.", "encoder_k.fc."),)),
    _Layout("an official MoCo v3 checkpoint", "base_encoder.", "momentum_encoder.", True,
            projectors=tuple((f"base_encoder.{head}.", f"momentum_encoder.{head}.") for head in ("fc", "head")),
            predictor="predictor."),
    _Layout("an official SimSiam checkpoint", "encoder.", None,
            projectors=(("encoder.fc.", ""),), predictor="predictor.", marker="predictor."),
    _Layout("a state dict", "encoder.", None, pretraining=False),
    _Layout("a state dict", "backbone.", None, pretraining=False),
    _Layout("a state dict", "", None, pretraining=False),
)  # fmt: skip
_HEADS = ("fc", "head", "heads", "classifier", "linear")
_MAX_WIDTH = 64
_MAX_GROWTH = 4  # of a network that a file states, over the file's tensors
_MAX_CHARACTERS, _MAX_PARTS = 200, 20  # characters of a key, and keys listed, in messages
_FIRST = r"conv1\.weight|patch_embed\.proj\.(?:0\.)?weight|stem\.conv1\.weight|conv_proj\.weight"
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
    crop_ratio: float = 0.875
    """Side of the center crop of evaluations over the image's shorter side."""
    warnings: list[str] = field(default_factory=list)

    @property
    def preprocess(self) -> CenterCrop:
        """From an image to the backbone's input [3, S, S]: the center crop that the run's kNN evaluated."""
        return CenterCrop(self.architecture.size, self.crop_ratio, self.statistics)

    def summary(self) -> str:
        """Return a line with the numbers of matched and unused keys."""
        total, parts = len(self.backbone.state_dict()), list(self.unused.items())[:_MAX_PARTS]
        unused = ", ".join(f"{part[:_MAX_CHARACTERS]} ({count})" for part, count in parts)
        return printable(
            f"{self.path}: {self.architecture}, {self.which} encoder of {self.kind}: {self.matched} of {total} "
            f"backbone keys matched{f'; not used: {unused}' if unused else ''}"
        )


def load_encoder(
    path: Path | str,
    which: Which = "online",
    *,
    heads: int = 0,
    prefix: str = "",
    trust_recipe: bool = False,
    custom: Architecture | None = None,
) -> LoadedEncoder:
    """Return the backbone in a file or folder, in evaluation mode, on the CPU, in float32.

    path: a Millrace run, checkpoint folder or exported file; .safetensors; or a file of torch.save. heads: of a
    transformer whose file lacks their number. prefix: of the backbone's keys, in a file of no known kind. trust_recipe:
    import the user's code that a run or exported file names as its `model.arch`. custom: the backbone of timm or of the
    user's code that the file has weights of. Raises InputError for a missing key, a wrong shape, an impossible value,
    or an unsafe file.
    """
    contents = read(Path(path))
    path = contents.path
    if custom := custom or _stated_custom(contents, trust_recipe):
        return _load_custom(contents, custom, which, prefix)
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
    found = _Found(layout, of_which, part)
    return _loaded(contents, found, backbone, architecture, which, expected, statistics)


def _loaded(
    contents: Contents,
    found: "_Found",
    backbone: Backbone,
    architecture: Architecture,
    which: Which,
    expected: Collection[str],
    statistics: Statistics,
) -> LoadedEncoder:
    """Return the backbone, loaded, with what else the file has."""
    layout, of_which, part = found
    matched = len(set(expected) & part.keys())
    loaded = LoadedEncoder(
        backbone.eval(), architecture, contents.path, layout.name, which, matched, contents.settings, contents.origin
    )
    loaded.heads, loaded.statistics = _find_heads(contents.state, layout, which), statistics
    loaded.crop_ratio = _crop_ratio(contents.described, contents.path)
    others = [key for key in contents.state if not key.startswith(of_which)]
    _note_unused(loaded, layout, part.keys() - set(expected), part, others)
    return loaded


class _Found(NamedTuple):
    """The part of a state that is a backbone's."""

    layout: _Layout
    prefix: str
    part: dict[str, torch.Tensor]
    """Values by their keys without the prefix, under our names."""


def _stated_custom(contents: Contents, trust_recipe: bool) -> Architecture | None:
    """Return the architecture of timm or of the user's code that a file states, if any."""
    stated, path = contents.described, contents.path
    arch, args = str(stated.get("arch", "")), stated.get("args")
    if not is_custom(arch):
        return None
    if needs_trust(arch) and not trust_recipe:
        raise UntrustedCode(path, arch)
    if args is not None and not (isinstance(args, dict) and all(str(key).isidentifier() for key in args)):
        raise InputError(f"{path}: arguments of {printable(arch)} that are no mapping: give another file")
    try:
        architecture = Architecture(arch, size=_size(int(stated.get("size", 224))), args=args)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: states an impossible size of images ({error}): give another file") from None
    if not trust_recipe and args:
        _check_stated_size(architecture, contents)
    return architecture


class UntrustedCode(InputError):
    """A file whose backbone would import code, or let timm fetch files."""

    def __init__(self, path: Path, arch: str) -> None:
        self.arch = printable(arch)
        remedy = "add --trust-recipe (in Python, trust_recipe=True) if you trust it"
        super().__init__(f"{path}: has the backbone {self.arch!r}, which would import code or fetch files: {remedy}")


def _check_stated_size(architecture: Architecture, contents: Contents) -> None:
    """Raise InputError for a network that is much larger than the file's tensors, or whose size cannot be told."""
    held = sum(value.numel() for value in contents.state.values())
    try:
        with torch.device("meta"):  # allocates nothing
            net = build_timm(architecture.arch, architecture.own_args, architecture.size)
        stated = sum(parameter.numel() for parameter in net.parameters())
    except Exception:
        raise UntrustedCode(contents.path, str(architecture)) from None
    if stated > _MAX_GROWTH * held:
        problem = f"states {printable(str(architecture))} of {stated} parameters, and has {held}"
        raise InputError(f"{contents.path}: {problem}: give another file")


def _load_custom(contents: Contents, architecture: Architecture, which: Which, prefix: str) -> LoadedEncoder:
    """Return the weights in a file for a backbone of timm or of the user's code."""
    state, path = contents.state, contents.path
    statistics = _statistics(contents.described, path)
    backbone = architecture.build()
    assert isinstance(backbone, CustomBackbone)
    expected = backbone.net.state_dict()

    def matched(found: _Found) -> int:
        return len(expected.keys() & found.part.keys())

    found = max(_candidates(state, which, unwrapped(prefix)), key=matched, default=None)
    if found is None or not matched(found):
        theirs, ours = (_list_keys(list(keys)[:3], "") for keys in (state, expected))
        where = f" under {prefix}" if prefix else f", {which} encoder"
        problem = f"no key of {architecture}{where} (the file's are {theirs} ..., the backbone's {ours} ...)"
        raise InputError(f"{path}: {problem}: give another file, or the prefix of its keys")
    _check(found.part, expected, path, found.prefix)
    _check_heads(backbone, contents, found.layout)
    backbone.net.load_state_dict(found.part, strict=False)
    return _loaded(contents, found, backbone, architecture, which, expected, statistics)


def _check_heads(backbone: CustomBackbone, contents: Contents, layout: _Layout) -> None:
    """Raise InputError for weights of a transformer of other attention heads, which no key or shape shows."""
    blocks = getattr(backbone.net, "blocks", None)
    own = getattr(getattr(next(iter(blocks), None), "attn", None), "num_heads", 0) if blocks else 0
    stated = contents.described
    published = VITS[stated["arch"]].heads if stated.get("arch") in VITS else 12 if layout.published_heads else 0
    theirs = int(stated.get("heads", 0)) or (0 if is_custom(str(stated.get("arch", ""))) else published)
    if own and theirs and own != theirs:
        problem = f"has {theirs} attention heads, and this run's backbone {own}"
        raise InputError(f"{contents.path}: {problem}: choose model.args {{num_heads: {theirs}}}")


def _layouts(prefix: str) -> tuple[_Layout, ...]:
    """Return the known layouts, or that of a state dict with the given prefix."""
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    given = _Layout(f"a state dict with the prefix {prefix}", prefix, None, pretraining=False)
    return (given,) if prefix else _LAYOUTS


def _candidates(state: dict[str, torch.Tensor], which: Which, prefix: str) -> Iterator[_Found]:
    """Yield the parts of a state that may be a custom backbone's."""
    for layout in _layouts(prefix):
        start = layout.online if which == "online" else layout.momentum
        if start is not None and any(key.startswith(layout.marker) for key in state):
            for inner in ("net.", ""):
                part = _strip(state, start + inner)
                yield _Found(layout, start + inner, part)
                yield _Found(layout, start + inner, to_ours(part))


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


def _crop_ratio(stated: dict[str, Any], path: Path) -> float:
    """Return the crop ratio that the file states, or the default. Raises InputError for a wrong one."""
    ratio = stated.get("crop_ratio") or 0.875
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise InputError(f"{path}: states crop_ratio {str(ratio)[:20]}, not above 0 and up to 1: give another file")
    return float(ratio)


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
    for layout in _layouts(prefix):
        part = to_ours(_strip(state, layout.online))
        if not any(key.startswith(layout.marker) for key in state):
            continue
        if any(re.match(_ROOTS, key) for key in part):
            return layout, part
    content = f"its keys are {_list_keys(list(state)[:3], '')} ..." if state else "it contains no tensors"
    if prefixes := _prefixes(state):
        content += f"; prefixes of such keys: {', '.join(prefixes[:_MAX_PARTS])}"
    where = f" under {prefix.rstrip('.')}." if prefix else ""
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
    if name in _OTHER_HEADS and not (count or layout.published_heads):
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


def _note_unused(
    loaded: LoadedEncoder,
    layout: _Layout,
    extra: Iterable[str],
    part: dict[str, torch.Tensor],
    others: Iterable[str],
) -> None:
    """Count the unused keys, and warn of `extra` ones that a pretrained encoder would not have."""
    unused = [key for key in part if key in set(extra)]
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
