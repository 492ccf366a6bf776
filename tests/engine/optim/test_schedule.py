"""Schedules on the device equal the functions on the host, and count taken steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config.settings import Method, Optim
from engine.optim.schedule import PATIENCE, Schedule, learning_rate, momentum_after
from tests.engine.small import settings

CPU, YES, NO = torch.device("cpu"), torch.tensor(True), torch.tensor(False)
OPTIMS: dict[str, dict[str, Any]] = {
    "cosine": {"warmup_epochs": 1.5, "lr_rule": "linear"},
    "cosine by step": {"schedule_interval": "step"},
    "steps": {"schedule": "steps", "milestones": [2, 3.5], "gamma": 0.5},
    "constant": {"schedule": "constant", "warmup_epochs": 1},
}


@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("ema_schedule", ["constant", "cosine"])
def test_rate_and_momentum_of_each_step(name: str, ema_schedule: Any) -> None:
    optim = Optim(lr=0.3, epochs=4, **OPTIMS[name])
    method = Method(name="moco_v3", ema_momentum=0.9, ema_schedule=ema_schedule)
    schedule = Schedule(replace(settings("moco_v3"), optim=optim, method=method), 5, CPU)
    lr, ema_weight = schedule.lr, schedule.ema_weight
    for step in range(20):
        schedule.begin()
        assert lr.item() == learning_rate(optim, step, 5, 8)
        assert ema_weight.item() == pytest.approx(1 - momentum_after(method, step, 20), abs=1e-15)
        assert schedule.numbers() == pytest.approx({"lr": lr.item(), "momentum": 1 - ema_weight.item()}, abs=1e-14)
        schedule.end(YES)
    schedule.begin()  # steps after the last are taken by benchmarks alone
    assert lr.item() == learning_rate(optim, 19, 5, 8)


def test_skipped_steps_do_not_count_and_many_in_a_row_are_divergence() -> None:
    optim = Optim(lr=0.3, epochs=40, schedule_interval="step")
    schedule = Schedule(replace(settings(), optim=optim), 1, CPU)
    for condition in (YES, YES, NO, NO):
        schedule.begin()
        schedule.end(condition)
    schedule.begin()
    assert (schedule.taken.item(), schedule.skipped.item()) == (2, 2)
    assert schedule.lr.item() == learning_rate(optim, 2, 1, 8)
    for _ in range(PATIENCE - 3):
        schedule.end(NO)
    assert (schedule.diverged(), schedule.diverged(3)) == (0, PATIENCE - 1)
    schedule.end(NO)
    assert schedule.diverged() == PATIENCE
    schedule.end(YES)
    assert schedule.diverged(1) == 0


def test_state_is_the_counts() -> None:
    one, two = (Schedule(settings(), 1, CPU) for _ in range(2))
    one.end(YES)
    one.end(NO)
    assert sorted(one.state_dict()) == ["skipped", "taken"]
    two.load_state_dict(one.state_dict())
    assert (two.taken.item(), two.skipped.item()) == (1, 1)
