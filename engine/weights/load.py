"""Encoders from files: Millrace's checkpoints, the official MoCo v1, v2 and v3's, state dicts of other libraries.

The keys of a file decide its kind. Every backbone key must be present, in its shape, and unused keys are listed: a
partly loaded encoder still gives features, but poor ones (facebookresearch/moco issue 126: 45 instead of 67.5).
Only tensors are unpickled.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.weights.architecture import Architecture, State, resnet_architecture, transformer_architecture
from engine.weights.custom import check_attention_heads, find_part, stated_architecture
from engine.weights.key_maps import to_ours
from engine.weights.layouts import (
    MAX_CHARACTERS,
    MAX_PARTS,
    BackbonePart,
    Layout,
    Which,
    find_heads,
    find_layout,
    list_keys,
    strip,
)
from engine.weights.readers import Contents, read, unwrapped
from methods.custom import CustomBackbone
from methods.registry import Backbone
from pipeline.augment.center_crop import CenterCrop
from pipeline.augment.color import IMAGENET, Statistics
from pipeline.system.errors import InputError
from pipeline.system.text import printable

_COUNTER = "num_batches_tracked"  # may be missing in older files: unused


_HEADS = ("fc", "head", "heads", "classifier", "linear")


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
    heads: dict[str, State] = field(default_factory=dict)
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
        total, parts = len(self.backbone.state_dict()), list(self.unused.items())[:MAX_PARTS]
        unused = ", ".join(f"{part[:MAX_CHARACTERS]} ({count})" for part, count in parts)
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
    if custom := custom or stated_architecture(contents, trust_recipe):
        return _load_custom(contents, custom, which, prefix)
    layout, part = find_layout(contents.state, path, unwrapped(prefix))
    of_which = layout.online if which == "online" else layout.momentum
    if of_which is None:
        raise InputError(f"{path}: is {layout.name}, of one encoder: choose the online one")
    if which == "momentum":
        part = to_ours(strip(contents.state, of_which))
        if not part:
            raise InputError(f"{path}: has no momentum encoder ({of_which}...): choose the online one")
    if path.is_file() and sum(value.nbytes for value in part.values()) > path.stat().st_size:
        raise InputError(f"{path}: its tensors are larger than the file by their shapes: save them with all values")
    try:
        if any(key.startswith("layer") for key in part):
            architecture = resnet_architecture(part, contents.described, path)
        else:
            architecture = transformer_architecture(part, contents.described, heads, layout.published_heads, path)
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
    return _loaded(contents, BackbonePart(layout, of_which, part), backbone, architecture, which, expected, statistics)


def _loaded(
    contents: Contents,
    part: BackbonePart,
    backbone: Backbone,
    architecture: Architecture,
    which: Which,
    expected: Collection[str],
    statistics: Statistics,
) -> LoadedEncoder:
    """Return the backbone, loaded, with what else the file has."""
    layout, of_which, values = part
    matched = len(set(expected) & values.keys())
    loaded = LoadedEncoder(
        backbone.eval(), architecture, contents.path, layout.name, which, matched, contents.settings, contents.origin
    )
    loaded.heads, loaded.statistics = find_heads(contents.state, layout, which), statistics
    loaded.crop_ratio = _crop_ratio(contents.described, contents.path)
    others = [key for key in contents.state if not key.startswith(of_which)]
    _note_unused(loaded, layout, values.keys() - set(expected), values, others)
    return loaded


def _load_custom(contents: Contents, architecture: Architecture, which: Which, prefix: str) -> LoadedEncoder:
    """Return the weights in a file for a backbone of timm or of the user's code."""
    statistics = _statistics(contents.described, contents.path)
    backbone = architecture.build()
    assert isinstance(backbone, CustomBackbone)
    expected = backbone.net.state_dict()
    part = find_part(contents, architecture, expected, which, prefix)
    _check(part.values, expected, contents.path, part.prefix)
    check_attention_heads(backbone, contents, part.layout)
    backbone.net.load_state_dict(part.values, strict=False)
    return _loaded(contents, part, backbone, architecture, which, expected, statistics)


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


def _check(part: State, expected: State, path: Path, prefix: str) -> None:
    """Raise InputError for missing keys, wrong shapes, non-finite values and negative variances."""
    missing = [key for key in expected if key not in part and not key.endswith(_COUNTER)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(expected)} backbone keys are missing: {list_keys(missing, prefix)}: give "
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


def _note_unused(
    loaded: LoadedEncoder,
    layout: Layout,
    extra: Iterable[str],
    part: State,
    others: Iterable[str],
) -> None:
    """Count the unused keys, and warn of `extra` ones that a pretrained encoder would not have."""
    unused = [key for key in part if key in set(extra)]
    of_heads = [key for key in unused if key.split(".")[0] in _HEADS]
    unknown = [key for key in unused if key.split(".")[0] not in _HEADS]
    warnings = []
    if of_heads and not layout.pretraining:
        names = ", ".join(f"{key[:MAX_CHARACTERS]} {list(part[key].shape)}" for key in of_heads[:4])
        warnings.append(
            f"{loaded.path}: {names}: the head of a classifier, left out: the encoder may have been trained with labels"
        )
    if unknown:
        keys = list_keys(unknown, "")
        warnings.append(f"{loaded.path}: keys that no {loaded.architecture.arch} has: {keys}")
    loaded.warnings = [printable(warning) for warning in warnings]
    label = "projection head" if layout.pretraining else "head"
    loaded.unused = Counter(f"{label} {key.split('.')[0]}.*" for key in of_heads)
    loaded.unused |= Counter(f"{key.split('.')[0]}.*" if "." in key else key for key in others)
    loaded.unused |= {"others": len(unknown)} if unknown else {}
