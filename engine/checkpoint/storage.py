"""Checkpoints: safetensors and JSON, written to a temporary folder and renamed, all hashed; nothing is unpickled.

checkpoints/step_00001234/model.safetensors      online.*, target.*, queue.*, schedule.*
                         /optimizer.safetensors  PARAMETER|STATE
                         /state.json             positions, settings, provenance, and the SHA-256 of the files
checkpoints/latest                               the name of the newest one

Folders with a dot before their name (`.step_...`) are being written or removed.
"""

import errno
import hashlib
import json
import logging
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

from pipeline.system.errors import InputError, RunFailed, describe_error
from pipeline.system.files import write_atomic
from pipeline.system.limits import check_levels, read_bytes

logger = logging.getLogger(__name__)

FORMAT = 5
_READABLE = (4, FORMAT)
_RENAMED = {"optimiser": "optimizer"}  # files of format 4
Tensors = dict[str, torch.Tensor]
_MAX_STATE_BYTES = 1 << 26
_MAX_STEP = 1 << 53
_SPARE_BYTES = 1 << 20  # needed in addition to the tensors'
_KEYS = {"format": int, "step": int, "loader": dict, "monitor": dict, "settings": dict, "files": dict}


class Writer:
    """Writes a run's checkpoints into `folder` from a thread: training waits for copies on the device only.

    A failure to write is a warning; training continues, and earlier checkpoints stay. The newest `keep` remain
    (0: all), and those of steps that are a multiple of `keep_every` (0: no others).
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._thread: threading.Thread | None = None
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        self.problem = ""
        """Why the newest checkpoint was not written, if it was not."""

    def save(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        """Start to write a checkpoint of `step` from copies of the tensors; waits for the one before."""
        self.wait()
        copies = {file: {name: _copy(t) for name, t in values.items()} for file, values in tensors.items()}
        on_gpu = [t for values in copies.values() for t in values.values() if t.is_cuda]
        copied = torch.cuda.current_stream(on_gpu[0].device).record_event() if on_gpu else None
        self._thread = threading.Thread(target=self._write, args=(step, copies, state, copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is finished, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises RunFailed where it could not be written."""
        self.wait()
        if self.problem:
            raise RunFailed(f"{self._folder}: the last checkpoint could not be written ({self.problem})")

    def _on_host(self, tensors: dict[str, Tensors], copied: torch.cuda.Event) -> dict[str, Tensors]:
        """Return tensors of a GPU in pinned memory, which the next call overwrites.

        A stream of its own copies them after the event `copied`: on the training stream they would wait for all steps
        that have been launched since.
        """
        device = next(t.device for values in tensors.values() for t in values.values() if t.is_cuda)
        self._stream = self._stream or torch.cuda.Stream(device)
        sizes = [-(-t.nbytes // 16) * 16 for values in tensors.values() for t in values.values()]
        if self._pinned.numel() < sum(sizes):
            self._pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        places = iter(self._pinned[: sum(sizes)].split(sizes))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(copied)
            hosts = {
                file: {name: _into(next(places), t) for name, t in values.items()} for file, values in tensors.items()
            }
            self._stream.synchronize()
        return hosts

    def _write(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any], copied: Any) -> None:
        try:
            write(self._folder, step, tensors if copied is None else self._on_host(tensors, copied), state)
            self.problem = ""
        except Exception as error:  # of any kind: the run is worth more than one checkpoint of it
            self.problem = describe_error(error)
            newest = last(self._folder)
            left = f"the newest is {newest.name}" if newest else "there is none yet"
            problem = f"the checkpoint could not be written ({self.problem})"
            logger.warning(f"step {step}: {problem}: training continues; {left}")
            return
        try:
            settle(self._folder, step, self._keep, self._keep_every)
        except OSError as error:
            problem = f"earlier checkpoints could not be removed ({describe_error(error)})"
            logger.warning(f"step {step}: the checkpoint is written, but {problem}: training continues")


def write(folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> Path:
    """Write a checkpoint of `step` into `folder`; call `settle` after it.

    tensors: by file name without suffix. A crash at any point leaves an intact checkpoint, if there was one. Raises
    OSError where it cannot be written; the others then stay as they were.
    """
    final = folder / f"step_{step:08d}"
    temporary, old = folder / f".{final.name}.writing", folder / f".{final.name}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        needed_bytes = sum(t.nbytes for values in tensors.values() for t in values.values())
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes + _SPARE_BYTES:
            problem = f"{needed_bytes / 1e6:.0f} MB are needed, {free_bytes / 1e6:.0f} MB are free in {folder}"
            raise OSError(errno.ENOSPC, problem)
        files = {}
        for name, values in tensors.items():
            path = temporary / f"{name}.safetensors"
            files[path.name] = _store(path, serialized({key: value.cpu() for key, value in values.items()}))
        document = {"format": FORMAT, "step": step, **state, "files": files}
        document["sha256"] = _hash_of(document)
        _store(temporary / "state.json", json.dumps(document, indent=1).encode())
        _sync(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
    except BaseException:
        if old.exists() and not final.exists():
            os.replace(old, final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def settle(folder: Path, step: int, keep: int = 0, keep_every: int = 0) -> None:
    """Set `latest` to the checkpoint of `step`, which is intact; remove older ones as `Writer` says.

    Raises OSError.
    """
    name = f"step_{step:08d}"
    write_atomic(folder / "latest", name)
    _sync(folder)
    shutil.rmtree(folder / f".{name}.old", ignore_errors=True)
    for old in _all(folder)[keep:] if keep else []:
        if not keep_every or step_of(old) % keep_every:
            leaving = folder / f".{old.name}.leaving"
            os.replace(old, leaving)
            shutil.rmtree(leaving)


def clear_up(folder: Path) -> None:
    """Remove the checkpoints that a killed run left half written or removed; put back one that it was replacing."""
    for path in folder.glob(".step_*.old"):
        final = folder / path.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            os.replace(path, final)
    for path in (*folder.glob(".step_*.writing"), *folder.glob(".step_*.leaving"), *folder.glob(".step_*.old")):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".writing-*"):
        path.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Return tensors and state of the checkpoint at `path`. Raises InputError where it is damaged."""
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
    """Return the newest checkpoint in `folder`, intact or not."""
    return next(iter(_all(folder)), None)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint in `folder`, and the problem of each newer one, which is skipped."""
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


def _into(place: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Start to copy a tensor into bytes of pinned memory; return the copy."""
    return place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy in new memory: on the same device, or on the CPU where that is full."""
    tensor = tensor.detach()
    try:
        return tensor.clone(memory_format=torch.contiguous_format)
    except torch.OutOfMemoryError:
        return tensor.to("cpu", copy=True).contiguous()


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdecimal()), key=step_of, reverse=True)


def read_state(path: Path, *, tensors: bool = True) -> dict[str, Any]:
    """Return the contents of a checkpoint's `state.json`. Raises InputError where it, or a file of tensors, is damaged.

    tensors: read the files of tensors too, to compare their hashes.
    """
    remedy, file = "resume from another checkpoint", path / "state.json"
    if not file.exists():
        raise InputError(f"{path}: not a checkpoint (it has no state.json): give the path of a step_... folder")
    content = read_bytes(file, _MAX_STATE_BYTES, remedy)
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
    if not 0 <= state["step"] <= _MAX_STEP:
        raise InputError(f"{file}: step is out of range: {remedy}")
    for name, sha256 in state["files"].items():
        if not re.fullmatch(r"\w+\.safetensors", name):
            raise InputError(f"{file}: names an impossible file {name!r}: {remedy}")
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
    """Write a file to the disk itself, past the system's cache; return the SHA-256 of `content`."""
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
