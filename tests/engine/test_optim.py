"""The optimiser's update and the learning-rate schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine.config import Optim
from engine.optim import build_optimiser, learning_rate


def test_update_is_sgd_with_momentum_and_decay_on_all_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimiser = build_optimiser(model, Optim(lr=0.1, momentum=0.9, weight_decay=0.01))
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p)
            velocity[i] = 0.9 * velocity[i] + p.grad + 0.01 * expected[i]
            expected[i] = expected[i] - 0.1 * velocity[i]
        optimiser.step()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p, e, atol=1e-6)


def test_cosine_by_epoch_is_mocos() -> None:
    settings = Optim(lr=0.03, epochs=200)
    for step in (0, 99, 100, 5000, 19999):
        epoch = step // 100
        assert learning_rate(settings, step, 100) == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200)))


def test_warm_up_is_linear_and_meets_the_cosine() -> None:
    settings = Optim(lr=1.0, epochs=10, warmup_epochs=2, by="step")
    assert [learning_rate(settings, s, 10) for s in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])
    assert learning_rate(settings, 20, 10) == pytest.approx(1.0)
    assert learning_rate(settings, 60, 10) == pytest.approx(0.5)
    assert learning_rate(settings, 100, 10) == pytest.approx(0.0, abs=1e-12)


def test_constant_stays() -> None:
    assert {learning_rate(Optim(schedule="constant", lr=0.2), s, 7) for s in (0, 3, 1000)} == {0.2}
