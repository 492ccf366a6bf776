"""Optimizers and schedules against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine.config.settings import Method, Optim
from engine.optim.lars import LARS
from engine.optim.optimizer import build_optimizer
from engine.optim.schedule import learning_rate, momentum_after, peak_rate


def test_sgd_has_momentum_and_decays_all_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(model, Optim(lr=0.1, momentum=0.9, weight_decay=0.01))
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p)
            velocity[i] = 0.9 * velocity[i] + p.grad + 0.01 * expected[i]
            expected[i] = expected[i] - 0.1 * velocity[i]
        optimizer.step()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p, e, atol=1e-6)


def test_adamw_is_torchs_and_decays_all_parameters() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        build_optimizer(ours, Optim(name="adamw", lr=0.1, weight_decay=0.3)),
        torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.3),
    ]
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    for name in ("sgd", "lars", "adamw"):
        groups = build_optimizer(model, Optim(name=name)).param_groups  # type: ignore[arg-type]
        assert sum(p.numel() for group in groups for p in group["params"]) == 6


def test_lars_is_that_of_moco_v3() -> None:
    """Matrices are decayed and scaled to trust * |w|, vectors are not; a weight or gradient of 0 is not scaled."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 3), torch.randn(5), torch.zeros(2, 2), torch.randn(2, 2), torch.randn(2, 1, 3, 3)]
    parameters = [nn.Parameter(w.double()) for w in weights]
    optimizer = LARS(parameters, lr=0.5, momentum=0.9, weight_decay=0.125, trust=0.02)
    expected = [w.double().clone() for w in weights]
    velocity = [torch.zeros_like(e) for e in expected]
    for step in range(3):
        gradients = [torch.randn_like(e) for e in expected]
        gradients[3] = -0.125 * expected[3] if step == 0 else gradients[3]  # cancels the decay exactly
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        for i, g in enumerate(gradients):
            w = expected[i]
            if w.ndim > 1:
                g = g + 0.125 * w
                if w.norm() > 0 and g.norm() > 0:
                    g = g * 0.02 * w.norm() / g.norm()
            velocity[i] = 0.9 * velocity[i] + g
            expected[i] = w - 0.5 * velocity[i]
        optimizer.step()
    for p, e in zip(parameters, expected, strict=True):
        assert torch.allclose(p, e, atol=1e-13, rtol=0)


def test_lars_skips_parameters_without_a_gradient() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([a, b], lr=1.0)
    a.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(a, torch.ones(2, 2))
    assert torch.equal(b, torch.ones(2, 2))


@pytest.mark.parametrize(("rule", "expected"), [("none", 0.3), ("linear", 4.8), ("sqrt", 1.2)])
def test_rate_grows_with_the_batch_by_its_rule(rule: str, expected: float) -> None:
    settings = Optim(lr=0.3, lr_rule=rule, schedule="constant")  # type: ignore[arg-type]
    assert peak_rate(settings, 4096) == pytest.approx(expected)
    assert learning_rate(settings, 5, 10, 4096) == pytest.approx(expected)


def test_cosine_by_epoch_is_that_of_moco() -> None:
    settings = Optim(lr=0.03, epochs=200)
    for step in (0, 99, 100, 5000, 19999):
        epoch = step // 100
        expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
        assert learning_rate(settings, step, 100, 256) == pytest.approx(expected)


def test_steps_are_those_of_moco_v1() -> None:
    settings = Optim(lr=0.03, epochs=200, schedule="steps", milestones=[120, 160])
    rates = [learning_rate(settings, epoch * 10 + 9, 10, 256) for epoch in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_warm_up_is_linear_and_meets_the_cosine() -> None:
    settings = Optim(lr=1.0, epochs=10, warmup_epochs=2, schedule_interval="step")
    assert [learning_rate(settings, s, 10, 256) for s in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])
    assert learning_rate(settings, 20, 10, 256) == pytest.approx(1.0)
    assert learning_rate(settings, 60, 10, 256) == pytest.approx(0.5)
    assert learning_rate(settings, 100, 10, 256) == pytest.approx(0.0, abs=1e-12)


def test_constant_rate_stays() -> None:
    assert {learning_rate(Optim(schedule="constant", lr=0.2), s, 7, 64) for s in (0, 3, 1000)} == {0.2}


def test_momentum_stays_or_rises_to_one() -> None:
    constant = Method(ema_momentum=0.9, ema_schedule="constant")
    rising = Method(ema_momentum=0.9, ema_schedule="cosine")
    assert [momentum_after(constant, s, 10) for s in (0, 9)] == [0.9, 0.9]
    assert [momentum_after(rising, s, 10) for s in (-1, 4, 9)] == pytest.approx([0.9, 0.95, 1.0])
