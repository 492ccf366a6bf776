"""Saved state of interrupted evaluations: the same command with the same settings resumes from it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoint import storage
from engine.checkpoint.storage import Tensors
from engine.evaluate.evaluation import Evaluation
from engine.parallel import collectives
from engine.parallel.consensus import broadcast_object
from pipeline.system.errors import InputError, describe_error
from pipeline.system.files import atomic_path

logger = get_logger(__name__)


_RENAMED = {"share": "crop_ratio", "processes": "world_size"}

E = TypeVar("E", bound=Evaluation)


class EpochCheckpoint(Generic[E]):
    """The checkpoint of a network in training, in OUT/NAME, replaced after each epoch.

    Contains the parameters and buffers of `model`, and SGD's momentum of the parameters in `optimizer`. settings: all
    that affect the computation. Only rank 0 reads and writes.
    """

    def __init__(
        self, evaluation: E, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ) -> None:
        self.evaluation, self.optimizer = evaluation, optimizer
        self._folder, self._model, self._settings = evaluation.out / name, model, settings

    def restore(self) -> int:
        """Load the checkpoint, if any, on all ranks; return the epochs done. Raises InputError for other settings."""
        saved = read_on_first(self._read, self.evaluation.device)
        if saved is None:
            return 0
        for name, value in self._tensors().items():
            value.copy_(saved[name])
        epoch = int(saved["epoch"])
        logger.info("resuming after epoch %d of %s", epoch, self._folder)
        return epoch

    def save(self, epoch: int) -> None:
        """Replace the checkpoint by one of the state after that many epochs."""
        if self.evaluation.is_main:
            state = {"loader": {}, "monitor": {}, "settings": self._settings}
            tensors = {name: value.detach().contiguous() for name, value in self._tensors().items()}
            storage.write(self._folder, epoch, {"state": tensors}, state)
            storage.settle(self._folder, epoch, keep=1)

    def _read(self) -> Tensors | None:
        """Return the tensors of the checkpoint, and its `epoch`."""
        path, _ = storage.newest(self._folder) if self._folder.is_dir() else (None, [])
        if path is None:
            return None
        files, state = storage.load(path)
        saved, current = _translate(state["settings"]), self._settings
        differing = sorted(key for key in {**saved, **current} if saved.get(key) != current.get(key))
        if differing:
            listed = ", ".join(f"{key} was {saved.get(key)!r}, now {current.get(key)!r}" for key in differing)
            raise InputError(
                f"{self._folder}: started with other settings ({listed}): choose another --out, or delete the folder"
            )
        tensors = files.get("state", {})
        if collectives.described(tensors) != collectives.described(self._tensors()):
            raise InputError(f"{path}: its tensors are not those of this network: delete it")
        return tensors | {"epoch": torch.tensor(state["step"])}

    def _tensors(self) -> Tensors:
        """Return all tensors by name, momentum included, without a copy."""
        named = {f"model|{name}": value for name, value in self._model.state_dict().items()}
        for name, parameter in self._model.named_parameters():
            state = self.optimizer.state.get(parameter)
            if state is not None:
                named[f"momentum|{name}"] = state["momentum_buffer"]
        return named


def read_on_first(read: Callable[[], Tensors | None], device: torch.device) -> Tensors | None:
    """Return, on all ranks and on the device, the tensors that `read` returns on rank 0."""
    tensors: Tensors = {}

    def describe() -> dict[str, Any] | None:
        if (read_tensors := read()) is None:
            return None
        tensors.update(read_tensors)
        return dict(collectives.described(tensors))

    shapes = broadcast_object(describe)
    return None if shapes is None else collectives.broadcast(tensors, shapes, device)


def save_cached(path: Path, settings: dict[str, Any], tensors: Tensors) -> None:
    """Write tensors, and the settings that they depend on, to a file. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(contiguous, temporary, metadata={"settings": json.dumps(settings, sort_keys=True)})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else None, str(error), str(path)) from None


def load_cached(path: Path, settings: dict[str, Any], fits: Callable[[Tensors], bool]) -> Tensors | None:
    """Return the tensors that `save_cached` wrote to a file.

    None if there is no file, or, with a log line, if it is damaged, of other settings, or does not satisfy `fits`.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("settings", "null"))
        same = isinstance(saved, dict) and _translate(saved) == json.loads(json.dumps(settings))
        tensors = load_file(path) if same else {}
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        logger.warning("%s: cannot be read (%s): recomputing", path, describe_error(error))
        return None
    if not same:
        logger.info("%s: cached with other settings: recomputing", path)
        return None
    if not fits(tensors):
        logger.warning("%s: its tensors do not fit these images: recomputing", path)
        return None
    return tensors


def _translate(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an earlier version under their present names."""
    return {_RENAMED.get(name, name): value for name, value in settings.items()}


def valid_ids(ids: torch.Tensor | None, images: int) -> bool:
    """Return whether cached ids are int64 [n], no more than the images, and all in range."""
    if ids is None or ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) > images:
        return False
    return not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < images)
