"""Backbones of timm (`timm:NAME`), and of the user's own code (`package.module:function`)."""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from methods.encoders import Mean
from methods.norm import ActivatedBatchNorm, BatchNorm, Norm

_TIMM = "timm:"
_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
READING = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})
"""Arguments of timm by which it reads or fetches other files."""
_MAX_CHARACTERS = 300  # of another library's error


class BackboneError(ValueError):
    """A backbone that cannot be built or used; the message says why, and the remedy."""


def is_custom(arch: str) -> bool:
    """Return whether this names a backbone of timm or of the user's code."""
    return ":" in arch


def needs_trust(arch: str, args: Mapping[str, Any] | None = None) -> bool:
    """Return whether building this imports the user's code, or lets timm read or fetch files by any name."""
    if not arch.startswith(_TIMM):
        return is_custom(arch)
    return not re.fullmatch(r"[\w.-]+", arch.removeprefix(_TIMM)) or bool(READING & (args or {}).keys())


class CustomBackbone(nn.Module):
    """Another library's or the user's module as a backbone: images [B, 3, S, S] to features [B, `features`].

    The module's output is [B, F], or maps [B, F, h, w], which are averaged. With `norm`, its BatchNorm layers are
    replaced by those that `norm` makes, with their weights. size: side S of the images, pixels, which is tried. Raises
    BackboneError for an output, a BatchNorm or a parameter that cannot be used.
    """

    def __init__(self, net: nn.Module, *, norm: Norm | None = None, size: int = 224) -> None:
        super().__init__()
        self.net, self.pool = net, Mean()
        for module in net.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = (
                    buffer if buffer is None else buffer.contiguous()
                )  # an expanded one is no memory
        self.features = self._output(size)[1]  # lazy layers get their weights here
        if norm is not None:
            _replace_batchnorm(self, norm, {})
            self.check(size)
        dtype = torch.get_default_dtype()
        if wrong := next((name for name, p in net.named_parameters() if p.dtype != dtype), None):
            raise BackboneError(f"parameter {wrong} is not of {dtype}: return a module whose parameters all are")
        if not any(p.requires_grad for p in net.parameters()):
            raise BackboneError("it has no parameter to train: return a module whose parameters require gradients")

    @property
    def transformer(self) -> bool:
        """Whether it has the tokens or positions of a vision transformer."""
        return any(name.endswith(("cls_token", "pos_embed")) for name in self.net.state_dict())

    def check(self, size: int) -> None:
        """Raise BackboneError where images of `size` pixels do not give `features` features."""
        if (features := self._output(size)[1]) != self.features:
            raise BackboneError(f"images of {size} pixels give {features} features, others {self.features}: pool them")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net(x)
        return self.pool(x) if x.ndim == 4 else x

    @torch.no_grad()
    def _output(self, size: int) -> torch.Size:
        """Return the shape of the output for two images of `size` pixels, in evaluation and in training mode.

        Ends in training mode, with statistics and torch's generator as they were.
        """
        with torch.random.fork_rng(devices=[]):
            evaluated = self._try(self.net.eval(), size)
            buffers = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
            trained = self._try(self.net.train(), size)
            for name, buffer in buffers.items():
                self.net.get_buffer(name).copy_(buffer)
        if trained != evaluated:
            problem = f"{list(trained)} in training and {list(evaluated)} in evaluation"
            raise BackboneError(f"two images give {problem}: return features of one shape")
        return evaluated

    def _try(self, net: nn.Module, size: int) -> torch.Size:
        try:
            output = net(torch.zeros(2, 3, size, size))
        except Exception as error:
            remedy = "correct it, or choose another data.size or other model.args"
            raise BackboneError(f"two images of {size} pixels fail in it ({_short(error)}): {remedy}") from error
        kind = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        if not isinstance(output, torch.Tensor) or output.ndim not in (2, 4) or len(output) != 2:
            mode = "training" if net.training else "evaluation"
            raise BackboneError(f"two images give {kind} in {mode}: return features [B, F] or maps [B, F, h, w]")
        return output.shape


def build_custom(arch: str, args: Mapping[str, Any], *, norm: Norm | None = None, size: int = 224) -> CustomBackbone:
    """Return the backbone that `arch` names, built with `args`. Imports code. Raises BackboneError."""
    net = build_timm(arch, args, size) if arch.startswith(_TIMM) else _call(arch, args)
    if not isinstance(net, nn.Module):
        raise BackboneError(f"returns {type(net).__name__}: return a torch.nn.Module")
    return CustomBackbone(net, norm=norm, size=size)


def build_timm(arch: str, args: Mapping[str, Any], size: int) -> nn.Module:
    """Return timm's model without its classifier, for images of `size` pixels where it takes one size only."""
    name = arch.removeprefix(_TIMM)
    try:
        import timm
    except ImportError as error:
        raise BackboneError(f"{error.name} is not installed: pip install timm") from None
    if not (timm.models.is_model(name.partition(".")[0]) or ":" in name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        remedy = f"choose {', '.join(close)}" if close else "timm.list_models() lists them"
        raise BackboneError(f"timm {timm.__version__} has no such model: {remedy}")
    if "num_classes" in args:
        raise BackboneError("model.args num_classes: its outputs would be a classifier's, not features: leave it out")
    options: dict[str, Any] = {"num_classes": 0}
    try:
        described = None if ":" in name else timm.models.get_pretrained_cfg(name)
        if described is not None and described.fixed_input_size:
            options["img_size"] = size
        return timm.create_model(name, **options | dict(args))
    except Exception as error:
        raise BackboneError(f"timm cannot create it ({_short(error)}): correct model.arch or model.args") from error


def _call(arch: str, args: Mapping[str, Any]) -> Any:
    """Return the result of the function that `arch` names; the working directory is searched last."""
    name, _, function = arch.partition(":")
    folder = os.getcwd()
    try:
        if folder not in sys.path:
            sys.path.append(folder)
        made: Any = importlib.import_module(name)
        for part in function.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as error:
        remedy = "name a function as package.module:function, of a module that Python finds"
        raise BackboneError(f"cannot be imported ({_short(error)}): {remedy}") from error
    except Exception as error:
        raise BackboneError(f"its module fails ({_short(error)}): correct it") from error
    try:
        return made(**args)
    except Exception as error:
        raise BackboneError(f"the call fails ({_short(error)}): correct it, or model.args") from error


def _replace_batchnorm(module: nn.Module, norm: Norm, made: dict[nn.Module, nn.Module]) -> None:
    """Replace each BatchNorm within the module; a layer that occurs twice is replaced by one. made: those so far."""
    for name, child in list(module._modules.items()):  # named_children leaves out a second occurrence
        if isinstance(child, _BatchNorm):
            module._modules[name] = made[child] = made.get(child) or _replacement(child, norm)
        elif child is not None:
            _replace_batchnorm(child, norm, made)


def _replacement(layer: Any, norm: Norm) -> BatchNorm:
    """Return a BatchNorm with the layer's weights, statistics and options, and with timm's activation after it."""
    kind, activated = type(layer).__name__, hasattr(layer, "drop") and hasattr(layer, "act")
    if not activated and type(layer) not in _TORCH:
        raise BackboneError(f"{kind} is a BatchNorm of another kind: use torch.nn.BatchNorm2d")
    if not layer.track_running_stats or layer.momentum is None:
        raise BackboneError(f"a {kind} has no running statistics or no momentum: set track_running_stats and momentum")
    made: Any = norm(layer.num_features, affine=layer.affine)
    if activated:
        made = ActivatedBatchNorm(made, layer.drop, layer.act)
    made.eps, made.momentum = layer.eps, layer.momentum
    made.load_state_dict(layer.state_dict())
    for name, parameter in layer.named_parameters(recurse=False):
        getattr(made, name).requires_grad_(parameter.requires_grad)
    return made  # type: ignore[no-any-return]


def _short(error: Exception) -> str:
    """Return an error on one line."""
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
