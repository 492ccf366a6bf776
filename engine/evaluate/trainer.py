"""Training that is kept after each epoch, and taken up there when the command is given again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from engine.checkpoint import storage
from engine.evaluate.evaluation import Trial
from engine.optim.optimizer import begin_momentum
from engine.parallel import collectives
from engine.parallel.accelerator import prepared
from engine.parallel.consensus import broadcast_object, run_on_all_ranks
from pipeline.system.errors import InputError

B = TypeVar("B")
_KEEP_AFTER = 100  # steps at least


class Kept:
    """The state of a network in training, in a folder, whole after every epoch.

    model: whose parameters and buffers are kept, and SGD's momentum of those that `optimizer` has. settings: those that
    bear on what is computed. Only the first process reads and writes.
    """

    def __init__(
        self, trial: Trial, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ) -> None:
        self._folder, self._model, self._optimizer, self._settings = trial.out / name, model, optimizer, settings
        self._trial = trial

    def restore(self) -> int:
        """Take up what is there; return the epochs done. Raises InputError where it is of other settings."""
        tensors: dict[str, storage.Tensors] = {}
        like = broadcast_object(lambda: self._read(tensors))
        if like is None:
            return 0
        found = collectives.broadcast(tensors.get("state", {}), like["tensors"], self._trial.device)
        for name, value in self._state().items():
            value.copy_(found[name])
        self._trial.say(f"going on after epoch {like['epoch']} of {self._folder}")
        return int(like["epoch"])

    def save(self, epoch: int) -> None:
        """Keep the state after that many epochs, in place of the one before."""
        if self._trial.first:
            state = {"loader": {}, "monitor": {}, "settings": self._settings}
            tensors = {name: value.detach().contiguous() for name, value in self._state().items()}
            storage.write(self._folder, epoch, {"state": tensors}, state)
            storage.settle(self._folder, epoch, keep=1)

    def _read(self, into: dict[str, storage.Tensors]) -> dict[str, Any] | None:
        path, _ = storage.newest(self._folder) if self._folder.is_dir() else (None, [])
        if path is None:
            return None
        tensors, state = storage.load(path)
        then, now = state["settings"], self._settings
        differing = sorted(key for key in {**then, **now} if then.get(key) != now.get(key))
        if differing:
            listed = ", ".join(f"{key} {then.get(key)!r} there, {now.get(key)!r} here" for key in differing)
            raise InputError(
                f"{self._folder}: was begun with other settings ({listed}): choose another --out, or remove it"
            )
        found, own = collectives.described(tensors.get("state", {})), collectives.described(self._state())
        if found != own or state["step"] < 0:
            raise InputError(f"{path}: holds other tensors than this classifier's: remove it")
        into |= tensors
        return {"epoch": state["step"], "tensors": found}

    def _state(self) -> storage.Tensors:
        """Return all tensors by name, momentum among them, as they are."""
        named = {f"model|{name}": value for name, value in self._model.state_dict().items()}
        for name, parameter in self._model.named_parameters():
            state = self._optimizer.state.get(parameter)
            if state is not None:
                named[f"momentum|{name}"] = state["momentum_buffer"]
        return named


def train_by_steps(
    trial: Trial,
    kept: Kept,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int, int], Iterator[B]],
    loss_of: Callable[[nn.Module, B], torch.Tensor],
    rate: Callable[[int], float],
    *,
    epoch: int,
    iterations: int,
) -> float:
    """Train up to that many iterations, from what was kept on; return the seconds it took.

    batches: of the steps from a first to before a last; `epoch` of them are one, after which the state is kept (after
    several where they are short). rate: of a step, for all parameters. Raises FloatingPointError for a loss that is not
    finite.
    """
    done, epochs, every = kept.restore(), -(-iterations // epoch), -(-_KEEP_AFTER // epoch)
    wrapped, stepper = prepared(trial.accelerator, model, optimizer)
    stream, began = batches(done * epoch, iterations), time.perf_counter()
    for number in trial.shown(range(done, epochs), "epochs"):
        wrapped.train()
        for step, batch in enumerate(islice(stream, epoch), start=number * epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            loss = loss_of(wrapped, batch)
            trial.accelerator.backward(loss)
            stepper.step()
            stepper.zero_grad()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"epoch {number + 1}: the loss is not finite: choose a lower --lr")
        if (number + 1) % every == 0 or number + 1 == epochs:
            kept.save(number + 1)
    return time.perf_counter() - began


def sgd(groups: list[dict[str, Any]], weight_decay: float = 0.0) -> torch.optim.SGD:
    """Return SGD of momentum 0.9, which is there, all 0, from the beginning; the learning rate is still to be set."""
    return begin_momentum(torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=weight_decay))


def new_head(features: int, classes: int, seed: int) -> nn.Linear:
    """Return a linear classifier of weights from N(0, 0.01) and biases 0 (facebookresearch/moco `main_lincls.py`)."""
    head = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=generator)
        head.bias.zero_()
    return head


def check_batch(batch: int, images: int) -> int:
    """Return the global batch, of at most all images. Raises InputError where it does not divide among processes."""
    batch = min(batch, images // collectives.world() * collectives.world())

    def check() -> None:
        if batch < 1 or batch % collectives.world():
            raise InputError(
                f"--batch {batch}: does not divide among {collectives.world()} processes: choose a multiple"
            )

    run_on_all_ranks(check)
    return batch
