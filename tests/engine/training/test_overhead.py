"""The cost of the non-finite check and of checkpoints, as a share of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.training.step
from engine.config.cli import parse
from engine.training.build import build
from engine.training.resume import restore, save
from methods.flat import Buffers
from tests.conftest import Figure
from tests.engine.test_run import SMALL

STEPS, WARM, BETWEEN = 4, 1, 100
"""Steps measured, steps before that, and steps between two checkpoints (an epoch of ImageNet has 5004)."""


@pytest.mark.slow
@pytest.mark.reliability
def test_guard_and_checkpoints_cost_less_than_a_hundredth(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """ResNet-18, 32 pixels, batch 32, on one core of the CPU, where copies are not free as on a GPU."""
    spent = {"guard": 0.0}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                spent["guard"] += time.thread_time() - began

        return call

    monkeypatch.setattr(engine.training.step, "get_total_norm", timed(engine.training.step.get_total_norm))
    for name in ("snapshot", "restore_unless"):
        monkeypatch.setattr(Buffers, name, timed(getattr(Buffers, name)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    larger = {"--data.batch": "32", "--data.size": "32", "--model.width": "1", "--method.queue_size": "1024"}
    given = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | larger | {"--data.train": str(drawn)}
    run = build(parse([part for pair in given.items() for part in pair] + ["--out", str(tmp_path / "out")]))
    try:
        restore(run)
        batches = (batch for _ in range(99) for batch in run.loader)
        for number in range(WARM + STEPS):
            if number == WARM:
                began, spent["guard"] = time.thread_time(), 0.0
            run.monitor.add(run.model.step(next(batches)), 32, 0.0)
            run.done += 1
        step, guard = (time.thread_time() - began) / STEPS, spent["guard"] / STEPS
        waits = []
        for _ in range(3):
            began = time.thread_time()
            save(run)
            waits.append(time.thread_time() - began)
            run.writer.finish()
    finally:
        run.close()
        torch.set_num_threads(threads)
    wait = sorted(waits)[1]
    shares = guard / step, wait / (BETWEEN * step)
    figure(
        "overhead of guard and checkpointing",
        f"guard {shares[0]:.2%} of a step of {1000 * step:.0f} ms (CPU time); a checkpoint has training wait "
        f"{1000 * wait:.0f} ms, {shares[1]:.2%} of {BETWEEN} steps",
    )
    assert max(shares) < 0.01
