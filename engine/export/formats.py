"""A pretrained encoder in the formats of other libraries, with a model card next to the file.

Every file is read back, and deleted if its features differ from the encoder's.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as serialized

from engine.export.model_card import card
from engine.weights.architecture import Architecture
from engine.weights.key_maps import Library, to_library
from engine.weights.load import LoadedEncoder, load_encoder
from engine.weights.readers import METADATA
from methods.custom import CustomBackbone
from methods.vit import VITS
from pipeline.system.errors import InputError, RunFailed, describe_error
from pipeline.system.files import atomic_path, write_atomic

_MAX_DISTANCE = 1e-5  # largest difference of features, relative to the largest feature
_OPSET = 17
State = dict[str, torch.Tensor]


class Format(NamedTuple):
    """A file format of another library."""

    suffix: str
    library: Library | None = None
    """The library whose names the weights get; None: our own."""
    wrap: Callable[[State], dict[str, Any]] = lambda state: state
    """Content of the file, for a state dict."""


FORMATS = {
    "torchvision": Format(".pth", "torchvision"),
    "timm": Format(".safetensors", "timm"),
    # DetectionCheckpointer matches layers by the ends of their names
    "detectron2": Format(
        ".pth", "detectron2", lambda state: {"model": state, "__author__": "Millrace", "matching_heuristics": True}
    ),
    "mmdet": Format(".pth", "mmdet", lambda state: {"state_dict": state, "meta": {}}),
    "safetensors": Format(".safetensors"),
    "onnx": Format(".onnx"),
}


def _write(encoder: LoadedEncoder, format: Format, path: Path) -> None:
    """Write the weights; a safetensors file also states architecture and normalization, in its header."""
    architecture = encoder.architecture
    module = encoder.backbone.net if isinstance(encoder.backbone, CustomBackbone) else encoder.backbone
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    if architecture.custom:  # whose tensors may share memory, which safetensors refuses
        state = {name: value.clone() for name, value in state.items()}
    if format.library is not None and not architecture.custom:
        state = to_library(state, format.library, transformer=architecture.transformer)
    if format.suffix == ".onnx":
        _write_onnx(encoder, path)
    elif format.suffix == ".safetensors":
        described = asdict(architecture) | encoder.statistics._asdict() | {"crop_ratio": encoder.preprocess.crop_ratio}
        path.write_bytes(serialized(state, {"format": "pt", METADATA: json.dumps(described)}))
    else:
        torch.save(format.wrap(state), path)


def read_back(path: Path, heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the encoder in a file, images to features. heads: of attention, which a state dict lacks."""
    if path.suffix != ".onnx":
        return load_encoder(path, heads=heads, trust_recipe=True).backbone  # its code has run already
    session = _onnx().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def _write_onnx(encoder: LoadedEncoder, path: Path) -> None:
    """Write a graph from `images` [B, 3, S, S], normalized, to `features` [B, F], for any B."""
    _onnx()
    size = encoder.architecture.size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation: the newer exporter needs one more package, for the same graph
        try:
            torch.onnx.export(
                encoder.backbone,
                (torch.zeros(2, 3, size, size),),
                str(path),
                input_names=["images"],
                output_names=["features"],
                dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}},
                opset_version=_OPSET,
                dynamo=False,
            )
        except Exception as error:
            if not encoder.architecture.custom:
                raise
            problem = f"torch cannot export {encoder.architecture} ({describe_error(error)})"
            raise InputError(f"--format onnx: {problem}: choose safetensors") from None


def _onnx() -> Any:
    """Return onnxruntime. Raises InputError if it or onnx is not installed."""
    try:
        import onnx  # noqa: F401 - the exporter needs it
        import onnxruntime
    except ImportError as error:
        remedy = "pip install -e '.[onnx]' in the clone"
        raise InputError(f"--format onnx: {error.name} is not installed: {remedy}") from None
    return onnxruntime


def export(encoder: LoadedEncoder, name: str, path: Path) -> float:
    """Write an encoder to `path` in the format of that name, with its card; return how far its features move.

    This is the largest difference on random images, relative to the largest feature. Raises InputError if the library
    has no such model or a file cannot be written, and RunFailed, without a file, if the features differ.
    """
    format, architecture = FORMATS[name], encoder.architecture
    refuse(architecture, name, format.library)
    if path.suffix != format.suffix or path.is_dir():
        raise InputError(f"--out {path}: give the name of a file that ends in {format.suffix}")
    try:
        with atomic_path(path) as temporary:
            _write(encoder, format, temporary)
            distance = _distance(encoder, read_back(temporary, architecture.heads))
            if not distance <= _MAX_DISTANCE:
                raise RunFailed(f"{path}: features differ by {distance:.1e} when read back: nothing was written")
            write_atomic(path.with_name(f"{path.name}.md"), card(encoder, name, path, distance))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}): choose another --out") from None
    return distance


def refuse(architecture: Architecture, name: str, library: Library | None) -> None:
    """Raise InputError if the library has no model of this architecture."""
    if library is None or (library == "timm" and architecture.arch.startswith("timm:")):
        return
    if architecture.custom or (architecture.transformer and VITS[architecture.arch].conv_stem):
        raise InputError(f"--format {name}: has no {architecture}: choose safetensors or onnx")
    if architecture.transformer:
        return
    if architecture.arch == "wide_resnet50_2" and library in ("detectron2", "mmdet"):
        raise InputError(f"--format {name}: has no {architecture}: choose torchvision, timm, safetensors or onnx")
    if architecture.width != 1 or architecture.arch == "resnet10":
        raise InputError(f"--format {name}: has no {architecture}: choose safetensors or onnx")
    if architecture.stem != "imagenet" and library in ("detectron2", "mmdet"):
        raise InputError(f"--format {name}: has no {architecture}: choose torchvision, timm, safetensors or onnx")


@torch.no_grad()
def _distance(encoder: LoadedEncoder, read: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return how far the features of the encoder read back are from the original's; infinite for another shape."""
    size = encoder.architecture.size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    original, other = encoder.backbone(images), read(images)
    if original.shape != other.shape:
        return math.inf
    return float((original - other).abs().max() / original.abs().max().clamp(min=1e-12))
