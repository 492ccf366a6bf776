"""Readers of encoder files: tensors by name. Only tensors and plain values are unpickled."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from engine.checkpoint import provenance, storage
from engine.config.renamed import translate
from pipeline.system.errors import InputError, describe_error
from pipeline.system.limits import open_regular, parse_json

METADATA = "millrace"
"""Key in a safetensors header of the architecture, as JSON, written by `engine.export`."""
_WRAPPED = ("state_dict", "model", "model_state", "model_state_dict")


class Contents(NamedTuple):
    """Content of a file."""

    path: Path
    """The file or checkpoint folder read, which may be within the given path."""
    state: dict[str, torch.Tensor]
    settings: dict[str, Any]
    described: dict[str, Any]
    """Fields of an `engine.weights.architecture.Architecture`, mean, std and crop_ratio, where the file has them."""
    origin: dict[str, Any]
    """Provenance of the run, if its checkpoint records it (`engine.checkpoint.provenance`)."""


def read(path: Path) -> Contents:
    """Return the content of a file or folder. Raises InputError."""
    if os.path.isdir(path):
        return _read_checkpoint(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file: give a run, a checkpoint folder, a .safetensors or a .pth")
    if path.suffix == ".safetensors":
        state, described = _read_safetensors(path)
        return Contents(path, _plain(state), {}, described, {})
    return Contents(path, _plain(_read_torch(path)), {}, {}, {})


def _read_checkpoint(path: Path) -> Contents:
    """Return the content of a checkpoint folder; given a run or its `checkpoints`, of the newest intact one."""
    for folder in (path / "checkpoints", path):
        if not (path / "state.json").exists() and (newest := storage.newest(folder)[0]):
            path = newest
            break
    tensors, state = storage.load(path)
    try:
        settings = translate(state["settings"])
        model, data = settings["model"], settings["data"]
        described = {"arch": model["arch"], "stem": model["stem"], "width": model["width"], "size": data["size"]}
        described |= {"args": model.get("args"), "crop_ratio": data.get("eval_crop_ratio")}
        described |= {name: data.get(name) for name in ("mean", "std")}
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: its settings describe no encoder: give another checkpoint") from None
    return Contents(path, tensors.get("model", {}), settings, described, provenance.recorded(state))


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            described = parse_json((file.metadata() or {}).get(METADATA, "{}"), path, "fetch it again")
        return load_file(path), described if isinstance(described, dict) else {}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not an intact safetensors file ({error}): fetch it again") from None


def _read_torch(path: Path) -> dict[str, Any]:
    """Return the state dict in a file of torch.save. Raises InputError for more than tensors and plain values.

    A zip is mapped into memory and never decompressed, so that no tensor can be larger than the file.
    """
    try:
        with open_regular(path) as file:
            if file.read(1) not in (b"P", b"\x80"):  # of a zip or a pickle
                raise InputError(f"{path}: not a file of weights: give a .safetensors, or a file of torch.save")
        mapped = _is_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of a junk file
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        match = re.search(
            r"GLOBAL ([\w.]+)|Unsupported (?:global|class|operand)[: ]*(?:GLOBAL )?([A-Za-z_][\w.]+)", str(error)
        )
        name = f" ({next(filter(None, match.groups()))})" if match else ""
        raise InputError(
            f"{path}: refused: contains more than tensors{name}, which could run any code when loaded: save its state "
            "dict as safetensors"
        ) from None
    except InputError:
        raise
    except Exception as error:  # torch's readers may raise anything on a damaged file
        raise InputError(f"{path}: cannot be read ({describe_error(error)}): fetch it again") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: contains {type(state).__name__}, not a state dict: save the state dict")
    return state


def _is_zip(path: Path) -> bool:
    """Return whether a file of torch.save is a zip. Raises InputError for a compressed one: torch writes none."""
    with open_regular(path) as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        members = zipfile.ZipFile(file).infolist()
    packed = next((m.filename for m in members if m.compress_type or m.compress_size != m.file_size), None)
    if packed is not None:
        raise InputError(f"{path}: {packed} is compressed, which torch.save never does: fetch it again")
    return True


def _plain(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, unwrapped, without the prefixes of DDP and compilation."""
    for key in _WRAPPED:
        inner = state.get(key)
        if isinstance(inner, dict) and any(isinstance(value, torch.Tensor) for value in inner.values()):
            state = inner
            break
    return {unwrapped(str(key)): value for key, value in state.items() if _has_values(value)}


def unwrapped(key: str) -> str:
    """Return a key, or the beginning of one, without the prefixes of DDP and compilation."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", key)


def _has_values(value: Any) -> bool:
    """Return whether it is a dense tensor with values: a file may contain sparse or quantized ones, or only shapes."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
