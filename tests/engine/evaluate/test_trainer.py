"""Training loops: epochs saved, non-finite losses, batches."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from engine.evaluate import trainer
from pipeline.system.errors import InputError


def _train(saved: list[int], losses: list[float], first: int, steps: int) -> SimpleNamespace:
    """Train for epochs of ten steps with these losses; return the evaluation, and add to `saved` the epochs saved."""
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(1, 1)
    evaluation = SimpleNamespace(progress=lambda items, unit: items, training_seconds=None, accelerator=accelerator)
    optimizer = trainer.sgd([{"params": list(model.parameters())}])
    checkpoint = SimpleNamespace(evaluation=evaluation, optimizer=optimizer, restore=lambda: first, save=saved.append)
    trainer.train(
        checkpoint,  # type: ignore[arg-type]
        model,
        lambda epoch: itertools.chain.from_iterable([loss] * 10 for loss in losses[epoch:]),
        lambda wrapped, loss: wrapped(torch.zeros(1)).sum() * 0 + loss,
        lambda step: [0.1],
        epoch_steps=10,
        steps=steps,
    )
    return evaluation


@pytest.mark.parametrize(("min_steps", "epochs"), [(1, [3, 4, 5]), (20, [4, 5]), (90, [5])])
def test_epochs_are_saved_now_and_then_and_at_the_end(
    min_steps: int, epochs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_MIN_STEPS_TO_SAVE", min_steps)
    saved: list[int] = []
    assert _train(saved, [0.0] * 5, 2, 44).training_seconds >= 0
    assert saved == epochs


def test_a_non_finite_loss_ends_training_before_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_MIN_STEPS_TO_SAVE", 10)
    saved: list[int] = []
    with pytest.raises(FloatingPointError, match="epoch 2: non-finite loss: choose a lower --lr"):
        _train(saved, [1.0, float("nan")], 0, 20)
    assert saved == [1]


def test_a_batch_is_at_most_all_images_and_a_multiple_of_the_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer.check_batch(256, 100) == 100
    monkeypatch.setattr(trainer.collectives, "world", lambda: 3)
    assert trainer.check_batch(256, 100) == 99
    with pytest.raises(InputError, match="--batch 32: does not divide among 3 ranks: choose a multiple"):
        trainer.check_batch(32, 100)
