"""Checkpoints: safetensors and JSON, written beside and renamed, every file hashed. Nothing is ever unpickled.

checkpoints/step_00001234/model.safetensors      online.*, target.*, queue.*, schedule.*
                         /optimiser.safetensors  PARAMETER|STATE
                         /state.json             positions, settings, and the SHA-256 of the files
checkpoints/latest                               the newest one's name
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError

FORMAT = 3
Tensors = dict[str, torch.Tensor]


def save(folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of `step` into `folder`; then remove all but the newest `keep` (0: none removed).

    tensors: by file name without suffix. A crash at any point leaves the earlier checkpoints whole.
    """
    final = folder / f"step_{step:08d}"
    beside = folder / f".{final.name}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    files = {}
    for name, values in tensors.items():
        path = beside / f"{name}.safetensors"
        save_file({key: _copy(value) for key, value in values.items()}, path)
        files[path.name] = _sha256(path)
    document = {"format": FORMAT, "step": step, **state, "files": files}
    document["sha256"] = _hash_of(document)
    (beside / "state.json").write_text(json.dumps(document, indent=1))
    for path in beside.iterdir():
        _sync(path)
    _sync(beside)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    _point_to(folder, final.name)
    if keep:
        for old in _all(folder)[keep:]:
            shutil.rmtree(old)
    return final


def load(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return tensors and state of the checkpoint at `path`. Raises InputError where it is not whole."""
    state = _verified_state(path)
    tensors = {}
    for name in state["files"]:
        try:
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path / name}: cannot be read ({error}): resume from another checkpoint") from None
    return tensors, state


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in `folder`, and what is wrong with each newer one that was passed over."""
    broken: list[str] = []
    for path in _all(folder):
        try:
            _verified_state(path)
            return path, broken
        except InputError as error:
            broken.append(str(error))
    return None, broken


def step_of(path: Path) -> int:
    """Return the step of the checkpoint at `path`, by its name."""
    return int(path.name.removeprefix("step_"))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU that shares no memory, contiguous."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdecimal()), key=step_of, reverse=True)


def _verified_state(path: Path) -> dict[str, Any]:
    remedy = "resume from another checkpoint"
    try:
        state = json.loads((path / "state.json").read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path}: not a checkpoint (it has no state.json): give the path of a step_... folder"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'state.json'}: cannot be read ({error}): {remedy}") from None
    if not isinstance(state, dict) or state.pop("sha256", None) != _hash_of(state):
        raise InputError(f"{path / 'state.json'}: damaged (its hash differs): {remedy}")
    if state.get("format") != FORMAT:
        raise InputError(f"{path}: checkpoint format {state.get('format')!r}, this version reads {FORMAT}: {remedy}")
    for name, sha256 in state["files"].items():
        if not (path / name).is_file() or _sha256(path / name) != sha256:
            raise InputError(f"{path / name}: damaged or missing (its hash differs): {remedy}")
    return state


def _hash_of(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_to(folder: Path, name: str) -> None:
    beside = folder / ".latest.writing"
    beside.write_text(name)
    _sync(beside)
    os.replace(beside, folder / "latest")
    _sync(folder)
