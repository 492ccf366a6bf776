"""A pretrained encoder in the formats of other libraries.

Beside the file goes a model card. What was written is read back, and gives the features it should, or it is removed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from engine.export.model_card import card
from engine.weights.key_maps import Library, renamed
from engine.weights.load import Architecture, Loaded, load_encoder
from engine.weights.readers import METADATA
from pipeline.system.errors import InputError, RunFailed

_CLOSE = 1e-5  # of features, relative to the largest
_OPSET = 17


class Format(NamedTuple):
    """A file that another library reads."""

    suffix: str
    write: Callable[[Loaded, Path], None]
    read: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]
    library: Library | None = None


def _read_back(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return load_encoder(path, heads=_heads(path)).backbone


def _heads(path: Path) -> int:
    """Return the attention heads that the card beside a file states, 0 for none: a state dict cannot say."""
    about = json.loads(path.with_name(f"{path.name}.json").read_text())
    return int(about["heads"])


def _state(loaded: Loaded, library: Library) -> dict[str, torch.Tensor]:
    state = {name: value.contiguous() for name, value in loaded.backbone.state_dict().items()}
    return renamed(state, library, transformer=loaded.architecture.transformer)


def _as_torchvision(loaded: Loaded, path: Path) -> None:
    torch.save(_state(loaded, "torchvision"), path)


def _as_timm(loaded: Loaded, path: Path) -> None:
    save_file(_state(loaded, "timm"), path, metadata=_described(loaded.architecture))


def _as_detectron2(loaded: Loaded, path: Path) -> None:
    """Write what DetectionCheckpointer reads, which finds each layer's place by the ends of the names."""
    content = {"model": _state(loaded, "detectron2"), "__author__": "Millrace", "matching_heuristics": True}
    torch.save(content, path)


def _as_mmdet(loaded: Loaded, path: Path) -> None:
    torch.save({"state_dict": _state(loaded, "mmdet"), "meta": {}}, path)


def _as_safetensors(loaded: Loaded, path: Path) -> None:
    """Write our own names; the header says what the shapes do not."""
    state = {name: value.contiguous() for name, value in loaded.backbone.state_dict().items()}
    save_file(state, path, metadata=_described(loaded.architecture))


def _described(architecture: Architecture) -> dict[str, str]:
    return {"format": "pt", METADATA: json.dumps(asdict(architecture))}


def _as_onnx(loaded: Loaded, path: Path) -> None:
    """Write a graph from `images` [B, 3, S, S], normalized, to `features` [B, F], for any B."""
    _onnx()
    size = loaded.architecture.size
    axes = {"images": {0: "batch"}, "features": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's age: the newer one needs a package more, for the same graph
        torch.onnx.export(
            loaded.backbone,
            (torch.zeros(2, 3, size, size),),
            str(path),
            input_names=["images"],
            output_names=["features"],
            dynamic_axes=axes,
            opset_version=_OPSET,
            dynamo=False,
        )


def _run_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = _onnx().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def _onnx() -> Any:
    """Return onnxruntime. Raises InputError where it or onnx is not installed."""
    try:
        import onnx  # noqa: F401 - the exporter wants it
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"--format onnx: {error.name} is not installed: pip install -e '.[onnx]' in the clone"
        ) from None
    return onnxruntime


FORMATS = {
    "torchvision": Format(".pth", _as_torchvision, _read_back, "torchvision"),
    "timm": Format(".safetensors", _as_timm, _read_back, "timm"),
    "detectron2": Format(".pth", _as_detectron2, _read_back, "detectron2"),
    "mmdet": Format(".pth", _as_mmdet, _read_back, "mmdet"),
    "safetensors": Format(".safetensors", _as_safetensors, _read_back),
    "onnx": Format(".onnx", _as_onnx, _run_onnx),
}


def export(loaded: Loaded, name: str, path: Path) -> float:
    """Write an encoder to `path` in the format of that name, with its card; return how far its features move.

    That is the largest difference on random images, relative to the largest feature. Raises InputError for an encoder
    that the library has no model for, and RunFailed, leaving nothing behind, where the features differ.
    """
    format = FORMATS[name]
    refuse(loaded.architecture, name, format.library)
    beside = path.with_name(f".writing-{path.name}")
    about = beside.with_name(f"{beside.name}.json")
    try:
        about.write_text(json.dumps(asdict(loaded.architecture)))
        format.write(loaded, beside)
        distance = _distance(loaded, format.read(beside))
        if not distance <= _CLOSE:
            raise RunFailed(f"{path}: gives other features when read back (by {distance:.1e}): nothing was written")
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}): choose another --to") from None
    finally:
        for left in (beside, about):
            left.unlink(missing_ok=True)
    path.with_name(f"{path.name}.md").write_text(card(loaded, name, path, distance))
    return distance


def refuse(architecture: Architecture, name: str, library: Library | None) -> None:
    """Raise InputError for an encoder that the library has no model for."""
    if library is None or architecture.transformer:
        return
    if architecture.width != 1:
        raise InputError(f"--format {name}: has no {architecture}: choose safetensors or onnx")
    if architecture.stem != "imagenet" and library in ("detectron2", "mmdet"):
        raise InputError(f"--format {name}: has no {architecture}: choose torchvision, timm, safetensors or onnx")


@torch.no_grad()
def _distance(loaded: Loaded, read: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return how far the features of the encoder as read back are from its own; infinity where the shapes differ."""
    size = loaded.architecture.size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    own, other = loaded.backbone(images), read(images)
    if own.shape != other.shape:
        return float(np.inf)
    return float((own - other).abs().max() / own.abs().max().clamp(min=1e-12))
