"""Training loops: epochs saved, non-finite losses, batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.evaluate import trainer
from pipeline.system.errors import InputError


def _checkpoint(saved: list[int]) -> SimpleNamespace:
    evaluation = SimpleNamespace(progress=lambda items, unit: items, training_seconds=None)
    return SimpleNamespace(evaluation=evaluation, save=saved.append)


@pytest.mark.parametrize(("every", "epochs"), [(1, [3, 4, 5]), (2, [4, 5]), (9, [5])])
def test_epochs_are_saved_now_and_then_and_at_the_end(every: int, epochs: list[int]) -> None:
    saved: list[int] = []
    checkpoint = _checkpoint(saved)
    trainer._run_epochs(checkpoint, range(2, 5), lambda epoch: torch.zeros(()), "--lr", every)  # type: ignore[arg-type]
    assert saved == epochs
    assert checkpoint.evaluation.training_seconds >= 0


def test_a_non_finite_loss_ends_training_before_it_is_saved() -> None:
    saved: list[int] = []
    losses = [torch.tensor(1.0), torch.tensor(float("nan"))]
    with pytest.raises(FloatingPointError, match="epoch 2: non-finite loss: choose a lower --lr"):
        trainer._run_epochs(_checkpoint(saved), range(2), losses.__getitem__, "--lr")  # type: ignore[arg-type]
    assert saved == [1]


def test_a_batch_is_at_most_all_images_and_a_multiple_of_the_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer.check_batch(256, 100) == 100
    monkeypatch.setattr(trainer.collectives, "world", lambda: 3)
    assert trainer.check_batch(256, 100) == 99
    with pytest.raises(InputError, match="--batch 32: does not divide among 3 ranks: choose a multiple"):
        trainer.check_batch(32, 100)
