"""Recording and replaying a function; on the CPU with a tape of operators in place of a CUDA graph."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from engine.config.settings import Optim
from engine.training.cuda_graph import WARM, Graph
from methods.co2 import CO2
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.sampling.order import shuffled_rows
from tests.engine.small import SIZE, batch_of, built, everything, settings, views
from tests.engine.tape import Tape

CPU = torch.device("cpu")


def test_inputs_are_copied_and_other_shapes_recorded_anew() -> None:
    called, tape = list[int](), Tape()

    def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        called.append(len(inputs["x"]))
        return {"y": 2 * inputs["x"]}

    graph = Graph(double, CPU, record=tape.record)
    for size in (3, 5, 3):
        before = tape.replayed
        for value in range(WARM + 3):
            x = torch.full((size,), float(value))
            assert torch.equal(graph({"x": x})["y"], 2 * x)
        assert tape.replayed - before == 3
    assert tape.recorded == 3
    assert called == [3] * (WARM + 1) + [5] * (WARM + 1) + [3] * (WARM + 1)


def test_a_shape_that_changes_while_warming_up_is_warmed_up_too() -> None:
    tape = Tape()
    graph = Graph(lambda inputs: {}, CPU, record=tape.record)
    for size in (3, 3, 5, 5, 5):
        graph({"x": torch.zeros(size)})
    assert tape.recorded == 0
    graph({"x": torch.zeros(5)})
    assert tape.recorded == 1


def test_the_first_error_is_the_one_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(function: Any) -> Any:
        try:
            raise RuntimeError("the cause")
        finally:
            raise RuntimeError("operation failed due to a previous error")

    graph = Graph(lambda inputs: sys.exc_info()[0], CPU, record=fail)
    assert [graph({"x": torch.zeros(1)}) for _ in range(WARM + 1)] == [None] * (WARM + 1)  # no traceback is kept
    assert "cannot be recorded (the cause)" in capsys.readouterr().err


def test_one_tensor_by_two_names_is_copied_once() -> None:
    kept: dict[str, torch.Tensor] = {}
    graph = Graph(lambda inputs: kept.update(inputs) or {}, CPU, record=Tape().record)
    for _ in range(WARM + 1):
        x = torch.randn(2)
        graph({"a": x, "b": x, "c": torch.randn(2)})
    assert kept["a"] is kept["b"]
    assert kept["a"] is not kept["c"]
    assert torch.equal(kept["a"], x)


def test_what_cannot_be_recorded_runs_as_usual_and_a_sentence_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    resets = list[int]()

    def fail(function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graph = Graph(lambda inputs: inputs["x"] + 1, CPU, lambda: resets.append(1), fail)
    for value in range(WARM + 3):
        assert graph({"x": torch.tensor(value)}) == value + 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: cuda_graph: it cannot be recorded (operation not permitted when stream is capturing): "
        "the step runs without"
    ]
    assert len(resets) == 1


def test_without_a_gpu_a_run_says_so_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    plain, asked = built(settings()), built(replace(settings(), cuda_graph=True))
    assert capsys.readouterr().err == "warning: cuda_graph: there is no GPU: the step runs without\n"
    for step in range(WARM + 2):
        results = [model.step(batch_of(*views(step))).parts["loss"] for model in (plain, asked)]
        assert torch.equal(*results)


SGD = Optim(lr=0.1, epochs=9, schedule="cosine", schedule_interval="step", warmup_epochs=2)
STEPS = [
    ("moco_v2", Terms(residual=Residual(), xmoco=XMoCo()), SGD, {}),
    ("moco_v2", Terms(co2=CO2()), SGD, {"bn": "shuffle"}),
    ("moco_v2", Terms(), replace(SGD, clip_grad_norm=0.5), {"gradient_accumulation_steps": 2, "bn": "split"}),
    ("moco_v2", Terms(residual=Residual()), SGD, {"activation_checkpointing": True}),
    ("moco_v3", Terms(residual=Residual()), replace(SGD, name="lars", lr=3.0), {"scaler": True}),
    ("simclr", Terms(xmoco=XMoCo()), replace(SGD, name="adamw", lr=0.01), {}),
    (
        "byol",
        Terms(),
        replace(SGD, name="adamw", lr=0.01, clip_grad_norm=0.5),
        {"gradient_accumulation_steps": 2, "scaler": True},
    ),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "terms", "optim", "more"), STEPS)
def test_a_recorded_step_trains_as_a_plain_one(
    name: str,
    terms: Terms,
    optim: Optim,
    more: dict[str, Any],
    device: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the CPU bit for bit: all that a step depends on is on the device, at the same place in every step.

    Batches that are not finite come while it is warming up, as it is recorded, and as it is replayed; measured steps
    and ones of another size come between.
    """
    on_cpu, tape = device == "cpu", Tape()
    batch, bn = 16 if more.get("bn") else 8, more.get("bn", "plain")
    momentum = {} if name == "simclr" else {"ema_schedule": "cosine"}
    chosen = replace(settings(name, terms, bn, batch, **momentum), optim=optim, gradient_shares=True)
    memory = {key: more[key] for key in ("gradient_accumulation_steps", "activation_checkpointing") if key in more}
    chosen = replace(chosen, **memory)
    models = []
    for graph in (False, not on_cpu):
        accelerator = Accelerator(cpu=on_cpu)
        if more.get("scaler"):
            accelerator.scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=3)
        models.append(built(replace(chosen, cuda_graph=graph), accelerator))
    plain, recorded = models
    if on_cpu:
        recorded.step._graph = Graph(recorded.step._take, CPU, recorded.step._reset, tape.record)
    for number in range(18):
        x1, x2 = (view.to(device) for view in views(number, batch, 2 * SIZE if number >= 12 else SIZE))
        if number in (1, WARM, 6):
            x1 = x1 * float("inf")
        order = shuffled_rows(0, number, batch)
        shuffled = {"shuffled": {0: x1[order], 1: x2[order]}, "order": order} if bn == "shuffle" else {}
        a, b = (m.step(batch_of(x1, x2, **shuffled), measured=number == 8) for m in models)
        assert a.taken == b.taken == (number not in (1, WARM, 6))
        tolerance = {"rtol": 0, "atol": 0} if on_cpu else {"rtol": 1e-6, "atol": 1e-8}
        told = [
            {**found.parts, **found.measures, "q": found.q, **everything(m)} for found, m in ((a, plain), (b, recorded))
        ]
        torch.testing.assert_close(told[1], told[0], equal_nan=True, **tolerance)
    assert "cuda_graph" not in capsys.readouterr().err  # which would say why there is none
    if on_cpu:
        assert tape.recorded == 2
        assert tape.replayed == 12 - WARM - 1 + 6 - WARM


@pytest.mark.parametrize("fault", ["reads the loss", "counts in Python"])
def test_the_tape_shows_what_a_graph_would_not_do(fault: str) -> None:
    """A step that waits for the device, or keeps something in Python, does not get through."""
    plain, recorded = built(settings()), built(settings())
    take, numbers = recorded.step._take, iter(range(99))

    def faulty(inputs: Any, measured: bool = False) -> Any:
        result = take(inputs, measured)
        if fault == "reads the loss" and result.parts["loss"].item() > 1e9:
            raise AssertionError
        if fault == "counts in Python":
            result.parts["loss"].add_(next(numbers)).sub_(next(numbers) - 1)
        return result

    tape = Tape()
    recorded.step._graph = Graph(faulty, CPU, recorded.step._reset, tape.record)
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("engine.training.cuda_graph._say", said.append)
        same = []
        for number in range(WARM + 4):
            a, b = (m.step(batch_of(*views(number))).parts["loss"].item() for m in (plain, recorded))
            same.append(a == b)
    if fault == "reads the loss":
        assert "not permitted" in said[0]
        assert all(same)
    else:
        assert not all(same)
