"""Tensors by name from the files that encoders come in. Nothing is unpickled but tensors and plain values."""

from __future__ import annotations

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
"""Key of a safetensors file's header under which `engine.export` describes the encoder, as JSON."""
_WRAPPED = ("state_dict", "model", "model_state", "model_state_dict")


class Contents(NamedTuple):
    """What a file holds."""

    path: Path
    """The file or checkpoint that was read, of those the given path holds."""
    state: dict[str, torch.Tensor]
    settings: dict[str, Any]
    described: dict[str, Any]
    """The fields of an `engine.weights.load.Architecture`, as far as the file gives them."""
    origin: dict[str, Any]
    """What the run was made by, as far as its checkpoint says (`engine.checkpoint.provenance`)."""


def read(path: Path) -> Contents:
    """Return the tensors of a file by name, and what it says of itself."""
    if os.path.isdir(path):
        return _read_checkpoint(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file: give a run, a checkpoint folder, a .safetensors or a .pth")
    if path.suffix == ".safetensors":
        state, described = _read_safetensors(path)
        return Contents(path, _plain(state), {}, described, {})
    return Contents(path, _plain(_read_torch(path)), {}, {}, {})


def _read_checkpoint(path: Path) -> Contents:
    """Return what a checkpoint folder holds; of a run, or of its folder of checkpoints, the newest whole one."""
    for folder in (path / "checkpoints", path):
        if not (path / "state.json").exists() and (found := storage.newest(folder)[0]):
            path = found
            break
    tensors, state = storage.load(path)
    settings = translate(state["settings"])
    try:
        model, data = settings["model"], settings["data"]
        described = {"arch": model["arch"], "stem": model["stem"], "width": model["width"], "size": data["size"]}
    except (KeyError, TypeError):
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
        raise InputError(f"{path}: not a whole safetensors file ({error}): fetch it again") from None


def _read_torch(path: Path) -> dict[str, Any]:
    """Return what torch.save wrote, as long as it is made of tensors and plain values: nothing else is unpickled.

    A zip is mapped into memory, so that no storage can be larger than its file, and none is decompressed.
    """
    try:
        mapped = _is_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a junk file's supposed protocol
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        what = re.search(
            r"GLOBAL ([\w.]+)|Unsupported (?:global|class|operand)[: ]*(?:GLOBAL )?([A-Za-z_][\w.]+)", str(error)
        )
        named = f" ({next(filter(None, what.groups()))})" if what else ""
        raise InputError(
            f"{path}: refused: it is no file of tensors alone{named}, and to load more would run whatever code its "
            "maker put in: have its state dict saved as safetensors"
        ) from None
    except InputError:
        raise
    except Exception as error:  # torch's readers raise whatever a damaged file makes them stumble over
        raise InputError(f"{path}: cannot be read ({describe_error(error)}): fetch it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}, not a state dict: have its state dict saved")
    return found


def _is_zip(path: Path) -> bool:
    """Return whether torch.save wrote a zip. Raises InputError for one that is compressed, as torch's are not."""
    with open_regular(path) as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        members = zipfile.ZipFile(file).infolist()
    packed = next((m.filename for m in members if m.compress_type or m.compress_size != m.file_size), None)
    if packed is not None:
        raise InputError(f"{path}: {packed} is compressed, as torch.save does not: fetch it again")
    return True


def _plain(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, unwrapped, without what DistributedDataParallel and compilation prefix."""
    for key in _WRAPPED:
        inner = found.get(key)
        if isinstance(inner, dict) and any(isinstance(value, torch.Tensor) for value in inner.values()):
            found = inner
            break
    return {
        re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in found.items() if _has_values(value)
    }


def _has_values(value: Any) -> bool:
    """Whether it is a tensor whose numbers are there: a file may hold sparse or quantized ones, or shapes alone."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
