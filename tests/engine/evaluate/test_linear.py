"""Linear protocols: published rates, as good as logistic regression, exact after an interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from engine.evaluate import linear
from engine.evaluate.linear import PROTOCOLS, Protocol
from pipeline.system.errors import InputError
from tests.engine.evaluate.conftest import copy_of, evaluate, interrupt_once, logistic_regression, problem


def test_rates_are_the_published_ones() -> None:
    moco, v3 = PROTOCOLS["moco"], PROTOCOLS["moco_v3"]
    assert [moco.rate(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert v3.rate(0) == pytest.approx(0.1 * 1024 / 256)
    assert v3.rate(45) == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert Protocol(30, 512, 100, "steps").rate(0) == 60


class _Crops:
    """A loader of given features instead of crops."""

    def __init__(self, x: torch.Tensor, batch: int) -> None:
        self._x, self._batch, self._epoch, self.steps = x, batch, 0, len(x) // batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]

    def __iter__(self) -> Any:
        order = np.random.default_rng(self._epoch).permutation(len(self._x))
        self._epoch += 1
        for at in range(0, len(order) - self._batch + 1, self._batch):
            ids = order[at : at + self._batch]
            yield type("Batch", (), {"views": (self._x[ids],), "ids": ids})

    def endless(self) -> Any:
        while True:
            yield from self

    def close(self) -> None:
        pass


class _Evaluation:
    """An evaluation whose encoder is the identity."""

    device, classes, train = torch.device("cpu"), 5, None

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._x, self._y, self.accelerator = x, y, Accelerator(cpu=True)
        self.backbone = type("Backbone", (), {"features": x.shape[1]})
        self.args = type("Arguments", (), {"seed": 0, "protocol": "moco"})

    def labels(self, beton: Any) -> torch.Tensor:
        return self._y

    def train_loader(self, beton: Any, batch: int) -> _Crops:
        return _Crops(self._x, batch)

    def progress(self, items: Any, unit: str) -> Any:
        return items

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return images


class _NoCheckpoint:
    """A checkpoint that saves nothing."""

    def __init__(self, evaluation: Any, name: str, model: Any, optimizer: Any, settings: Any) -> None:
        self.evaluation, self.optimizer = evaluation, optimizer

    def restore(self) -> int:
        return 0

    def save(self, epoch: int) -> None:
        pass


@pytest.mark.parametrize(("name", "epochs"), [("moco", 60), pytest.param("moco_v3", 90, marks=pytest.mark.slow)])
def test_protocols_are_as_good_as_logistic_regression(name: str, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "EpochCheckpoint", _NoCheckpoint)
    train, labels, test, true = problem()
    scale = 30 if name == "moco" else 3  # rates as high as 30 are for features as small as a ResNet's
    expected = logistic_regression(train, labels, test, true)
    train, test = train / train.std(dim=0) / scale, test / train.std(dim=0) / scale
    protocol = Protocol(PROTOCOLS[name].lr, 100, epochs, PROTOCOLS[name].schedule)
    head = linear.train(_Evaluation(train, labels), protocol, {})  # type: ignore[arg-type]
    correct = head(test).argmax(dim=1) == true
    assert abs(correct.double().mean().item() - expected) < 0.01


def test_an_interrupted_training_resumes_exactly(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--epochs", "3", "--batch", "32", "--lr", "1"]
    undisturbed = evaluate("linear", encoder, drawn, *options)
    expected = load_file(next((encoder.parent / "out" / "linear_moco").glob("step_*/state.safetensors")))
    other = copy_of(encoder)
    saves = interrupt_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate("linear", other, drawn, *options)
    resumed = evaluate("linear", other, drawn, *options)
    assert saves == [1, 2, 3]
    assert resumed["per_class"] == undisturbed["per_class"]
    state = load_file(next((other.parent / "out" / "linear_moco").glob("step_*/state.safetensors")))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with pytest.raises(InputError, match=r"lr was 1\.0, now 2\.0"):
        evaluate("linear", other, drawn, *options[:-1], "2")
