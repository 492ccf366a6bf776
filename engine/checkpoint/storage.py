"""Checkpoints: safetensors and JSON, written beside and renamed, every file hashed. Nothing is ever unpickled.

checkpoints/step_00001234/model.safetensors      online.*, target.*, queue.*, schedule.*
                         /optimizer.safetensors  PARAMETER|STATE
                         /state.json             positions, settings, what made it, and the SHA-256 of the files
checkpoints/latest                               the newest one's name

What stands under another name there (`.step_...`) is on its way in or out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized

from pipeline.system.errors import InputError, RunFailed, describe_error, tell
from pipeline.system.limits import check_levels, read_bytes

FORMAT = 5
_READABLE = (4, FORMAT)
_RENAMED = {"optimiser": "optimizer"}  # files of format 4
Tensors = dict[str, torch.Tensor]
_LARGEST_STATE = 1 << 26  # bytes of a state.json: more is not one
_LAST_STEP = 1 << 53
_ROOM = 1 << 20  # bytes wanted free besides the tensors'
_KEYS = {"format": int, "step": int, "loader": dict, "monitor": dict, "settings": dict, "files": dict}


class Writer:
    """Writes a run's checkpoints into `folder`, in a thread of its own: training waits for copies on the device only.

    What cannot be written is told on stderr; training goes on, and earlier checkpoints stay. Kept are the newest `keep`
    (0: all), and those whose step is a multiple of `keep_every` (0: none besides).
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._thread: threading.Thread | None = None
        self.problem = ""
        """Why the newest checkpoint was not written, if it was not."""

    def save(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint of `step` as things stand now; waits for the one before."""
        self.wait()
        copies = {file: {name: _copy(t) for name, t in values.items()} for file, values in tensors.items()}
        on_gpu = [t for values in copies.values() for t in values.values() if t.is_cuda]
        copied = torch.cuda.current_stream(on_gpu[0].device).record_event() if on_gpu else None
        self._thread = threading.Thread(target=self._write, args=(step, copies, state, copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is there, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for it as the last one. Raises RunFailed where it could not be written."""
        self.wait()
        if self.problem:
            raise RunFailed(f"{self._folder}: the last checkpoint could not be written ({self.problem})")

    def _write(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any], copied: Any) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            write(self._folder, step, tensors, state)
            self.problem = ""
        except Exception as error:  # whatever it is: the run is worth more than one checkpoint of it
            self.problem = describe_error(error)
            left = _all(self._folder)
            kept = f"the newest is {left[0].name}" if left else "there is none yet"
            tell(
                f"warning: step {step}: the checkpoint could not be written ({self.problem}): training goes on; {kept}"
            )
            return
        try:
            settle(self._folder, step, self._keep, self._keep_every)
        except OSError as error:
            says = f"earlier checkpoints could not be tidied up ({describe_error(error)})"
            tell(f"warning: step {step}: the checkpoint is written, but {says}: training goes on")


def write(folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> Path:
    """Write a checkpoint of `step` into `folder`, for `settle` to follow.

    tensors: by file name without suffix. A crash at any point leaves a whole checkpoint, if there was one. Raises
    OSError where it cannot be written; the others are then as they were.
    """
    final = folder / f"step_{step:08d}"
    beside, aside = folder / f".{final.name}.writing", folder / f".{final.name}.old"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _check_room(folder, sum(t.nbytes for values in tensors.values() for t in values.values()))
        files = {}
        for name, values in tensors.items():
            path = beside / f"{name}.safetensors"
            files[path.name] = _store(path, serialized({key: value.cpu() for key, value in values.items()}))
        document = {"format": FORMAT, "step": step, **state, "files": files}
        document["sha256"] = _hash_of(document)
        _store(beside / "state.json", json.dumps(document, indent=1).encode())
        _sync(beside)
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.replace(final, aside)
        os.replace(beside, final)
    except BaseException:
        if aside.exists() and not final.exists():
            os.replace(aside, final)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return final


def settle(folder: Path, step: int, keep: int = 0, keep_every: int = 0) -> None:
    """Have `latest` name the checkpoint of `step`, which is whole; remove what is not kept, as `Writer` says.

    Raises OSError where that cannot be done.
    """
    name = f"step_{step:08d}"
    _point_to(folder, name)
    shutil.rmtree(folder / f".{name}.old", ignore_errors=True)
    for old in _all(folder)[keep:] if keep else []:
        if not keep_every or step_of(old) % keep_every:
            leaving = folder / f".{old.name}.leaving"
            os.replace(old, leaving)
            shutil.rmtree(leaving)


def clear_up(folder: Path) -> None:
    """Remove what a run that was killed left half written or half removed; put back what it had put aside."""
    for path in folder.glob(".step_*.old"):
        final = folder / path.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            os.replace(path, final)
    for path in (*folder.glob(".step_*.writing"), *folder.glob(".step_*.leaving"), *folder.glob(".step_*.old")):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (folder / ".latest.writing").unlink()


def load(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return tensors and state of the checkpoint at `path`. Raises InputError where it is not whole."""
    state = read_state(path)
    tensors = {}
    for name in state["files"]:
        try:
            stem = name.removesuffix(".safetensors")
            tensors[_RENAMED.get(stem, stem)] = load_file(path / name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path / name}: cannot be read ({error}): resume from another checkpoint") from None
    return tensors, state


def last(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder`, whole or not."""
    return next(iter(_all(folder)), None)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in `folder`, and what is wrong with each newer one that was passed over."""
    broken: list[str] = []
    for path in _all(folder):
        try:
            read_state(path)
            return path, broken
        except InputError as error:
            broken.append(str(error))
    return None, broken


def step_of(path: Path) -> int:
    """Return the step of the checkpoint at `path`, by its name."""
    return int(path.name.removeprefix("step_"))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that shares no memory, contiguous: on its device, or on the CPU where there is no room."""
    own = tensor.detach()
    try:
        return own.clone(memory_format=torch.contiguous_format)
    except torch.OutOfMemoryError:
        return own.to("cpu", copy=True).contiguous()


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdecimal()), key=step_of, reverse=True)


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted + _ROOM:
        says = f"{wanted / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free in {folder}"
        raise OSError(errno.ENOSPC, says)


def read_state(path: Path, *, tensors: bool = True) -> dict[str, Any]:
    """Return what `state.json` of a checkpoint says. Raises InputError where that, or a file of tensors, is damaged.

    tensors: read their files too, to compare their hashes.
    """
    remedy, file = "resume from another checkpoint", path / "state.json"
    if not file.exists():
        raise InputError(f"{path}: not a checkpoint (it has no state.json): give the path of a step_... folder")
    content = read_bytes(file, _LARGEST_STATE, remedy)
    try:
        state = json.loads(content)
        check_levels(state)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read ({error}): {remedy}") from None
    if not isinstance(state, dict) or state.pop("sha256", None) != _hash_of(state):
        raise InputError(f"{file}: damaged (its hash differs): {remedy}")
    if state.get("format") not in _READABLE:
        versions = " and ".join(map(str, _READABLE))
        raise InputError(f"{path}: checkpoint format {state.get('format')!r}, this version reads {versions}: {remedy}")
    for key, kind in _KEYS.items():
        if not isinstance(state.get(key), kind) or isinstance(state.get(key), bool):
            raise InputError(f"{file}: {key} is {state.get(key)!r}: {remedy}")
    if not 0 <= state["step"] <= _LAST_STEP:
        raise InputError(f"{file}: step is beyond all measure: {remedy}")
    for name, sha256 in state["files"].items():
        if not re.fullmatch(r"\w+\.safetensors", name):
            raise InputError(f"{file}: names a file {name!r}: {remedy}")
        if not (path / name).is_file() or (tensors and _sha256(path / name) != sha256):
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


def _store(path: Path, content: bytes) -> str:
    """Write a file to the disk itself; return the SHA-256 of what was to be written."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_to(folder: Path, name: str) -> None:
    beside = folder / ".latest.writing"
    _store(beside, name.encode())
    os.replace(beside, folder / "latest")
    _sync(folder)
