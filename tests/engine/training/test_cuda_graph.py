"""A step that is recorded and replayed trains like a plain one; on the CPU a tape stands in for the CUDA graph."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from engine.config.settings import Optim
from engine.parallel.accelerator import build_accelerator
from engine.parallel.rendezvous import rank, world
from engine.training.cuda_graph import WARM
from methods.co2 import CO2
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.sampling.order import shuffled_rows
from tests.engine.small import SIZE, batch_of, built, everything, settings, views
from tests.engine.tape import TapedGraph
from tests.gloo import on_ranks


def test_inputs_are_copied_and_other_shapes_recorded_anew() -> None:
    called = list[int]()

    def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        called.append(len(inputs["x"]))
        return {"y": 2 * inputs["x"]}

    graph = TapedGraph(double)
    for size in (3, 5, 3):
        before = graph.tape.replayed
        for value in range(WARM + 3):
            x = torch.full((size,), float(value))
            assert torch.equal(graph({"x": x})["y"], 2 * x)
        assert graph.tape.replayed - before == 3
    assert graph.tape.recorded == 3
    assert called == [3] * (WARM + 1) + [5] * (WARM + 1) + [3] * (WARM + 1)


def test_shape_that_changes_during_warm_up_is_warmed_up_too() -> None:
    graph = TapedGraph(lambda inputs: {})
    for size in (3, 3, 5, 5, 5):
        graph({"x": torch.zeros(size)})
    assert graph.tape.recorded == 0
    graph({"x": torch.zeros(5)})
    assert graph.tape.recorded == 1


def test_first_error_is_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(function: Any) -> Any:
        try:
            raise RuntimeError("the cause")
        finally:
            raise RuntimeError("operation failed due to a previous error")

    graph = TapedGraph(lambda inputs: sys.exc_info()[0], record=fail)
    assert [graph({"x": torch.zeros(1)}) for _ in range(WARM + 1)] == [None] * (WARM + 1)  # no traceback is held
    assert "cannot be recorded (the cause)" in capsys.readouterr().err


def test_tensor_with_two_names_is_copied_once() -> None:
    copies: dict[str, torch.Tensor] = {}
    graph = TapedGraph(lambda inputs: copies.update(inputs) or {})
    for _ in range(WARM + 1):
        x = torch.randn(2)
        graph({"a": x, "b": x, "c": torch.randn(2)})
    assert copies["a"] is copies["b"]
    assert copies["a"] is not copies["c"]
    assert torch.equal(copies["a"], x)


def test_function_that_cannot_be_recorded_runs_as_usual_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    resets = list[int]()

    def fail(function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graph = TapedGraph(lambda inputs: inputs["x"] + 1, lambda: resets.append(1), fail)
    for value in range(WARM + 3):
        assert graph({"x": torch.tensor(value)}) == value + 1
    assert capsys.readouterr().err.splitlines() == [
        "warning: cuda_graph: it cannot be recorded (operation not permitted when stream is capturing): "
        "the step runs without"
    ]
    assert len(resets) == 1


def test_without_a_gpu_training_runs_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
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
@pytest.mark.parametrize(
    ("name", "terms", "optim", "more"),
    [pytest.param(*step, marks=[] if number in (0, 4, 6) else pytest.mark.slow) for number, step in enumerate(STEPS)],
)
def test_recorded_step_trains_like_a_plain_one(
    name: str,
    terms: Terms,
    optim: Optim,
    more: dict[str, Any],
    device: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit on the CPU: all inputs of a step are on the device, at the same place in every step.

    Non-finite batches come during warm-up, recording and replay; measured steps and other sizes come in between.
    """
    on_cpu = device == "cpu"
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
        graph = recorded.step._graph = TapedGraph(recorded.step._train_step, recorded.step._reset)
    for number in range(18):
        x1, x2 = (view.to(device) for view in views(number, batch, 2 * SIZE if number >= 12 else SIZE))
        if number in (1, WARM, 6):
            x1 = x1 * float("inf")
        order = shuffled_rows(0, number, batch)
        shuffled = {"shuffled": {0: x1[order], 1: x2[order]}, "order": order} if bn == "shuffle" else {}
        a, b = (m.step(batch_of(x1, x2, **shuffled), measured=number == 8) for m in models)
        assert a.taken == b.taken == (number not in (1, WARM, 6))
        tolerance = {"rtol": 0, "atol": 0} if on_cpu else {"rtol": 1e-6, "atol": 1e-8}
        states = [
            {"values": result.values, **result.measures, **everything(m)} for result, m in ((a, plain), (b, recorded))
        ]
        torch.testing.assert_close(states[1], states[0], equal_nan=True, **tolerance)
    assert "cuda_graph" not in capsys.readouterr().err  # no warning
    if on_cpu:
        assert graph.tape.recorded == 2
        assert graph.tape.replayed == 12 - WARM - 1 + 6 - WARM


def run_mixed(name: str, out: str) -> None:
    """Take 50 steps, every fifth measured, plain and recorded: states and results must agree on every rank."""
    bn, optim = ("sync", replace(SGD, name="lars", lr=3.0)) if name == "moco_v3" else ("plain", SGD)  # type: ignore[arg-type]
    chosen = replace(settings(name, Terms(residual=Residual()), bn), optim=optim, cpu=True, tracker="none")
    plain, recorded = (built(chosen, build_accelerator(chosen)) for _ in range(2))
    graph = recorded.step._graph = TapedGraph(recorded.step._train_step, recorded.step._reset)
    for number in range(50):
        halves = [view.chunk(world())[rank()] for view in views(number)]
        if number == 20 and rank() == 1:
            halves[0] = halves[0] * float("inf")
        a, b = (m.step(batch_of(*halves), measured=number % 5 == 4) for m in (plain, recorded))
        results = [{"values": result.values, **result.measures} for result in (a, b)]
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)
        assert a.taken == b.taken == (number != 20)
    torch.testing.assert_close(everything(recorded), everything(plain), rtol=0, atol=0)
    assert graph.tape.recorded == 1
    assert graph.tape.replayed == 40 - WARM
    Path(out, str(rank())).touch()


@pytest.mark.parametrize("name", ["moco_v2", pytest.param("moco_v3", marks=pytest.mark.slow)])
def test_steps_of_two_ranks_are_replayed_between_measured_ones(name: str, tmp_path: Path) -> None:
    on_ranks(2, run_mixed, name, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def run_refused(out: str) -> None:
    """Rank 1 cannot record: both ranks run without."""

    def record(function: Any) -> Any:
        if rank() == 1:
            raise RuntimeError("no memory")
        return pytest.fail, None  # rank 0 could replay

    chosen = replace(settings(), cpu=True, tracker="none")
    plain, recorded = (built(chosen, build_accelerator(chosen)) for _ in range(2))
    recorded.step._graph = TapedGraph(recorded.step._train_step, recorded.step._reset, record)
    reasons: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.training.cuda_graph._warn", reasons.append)
        for number in range(WARM + 3):
            halves = [view.chunk(world())[rank()] for view in views(number)]
            a, b = (m.step(batch_of(*halves)) for m in (plain, recorded))
            assert torch.equal(a.parts["loss"], b.parts["loss"])
    prefix = "rank 1: " if rank() == 0 else ""
    assert reasons == [f"{prefix}it cannot be recorded (no memory)"]
    Path(out, str(rank())).touch()


def test_rank_that_cannot_record_has_all_ranks_run_without(tmp_path: Path) -> None:
    on_ranks(2, run_refused, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("fault", ["reads the loss", "counts in Python"])
def test_tape_finds_steps_that_a_graph_would_break(fault: str) -> None:
    """A step that waits for the device, or has state in Python."""
    plain, recorded = built(settings()), built(settings())
    train_step, numbers = recorded.step._train_step, iter(range(99))

    def faulty(inputs: Any, measured: bool = False) -> Any:
        result = train_step(inputs, measured)
        if fault == "reads the loss" and result.parts["loss"].item() > 1e9:
            raise AssertionError
        if fault == "counts in Python":
            result.parts["loss"].add_(next(numbers)).sub_(next(numbers) - 1)
        return result

    recorded.step._graph = TapedGraph(faulty, recorded.step._reset)
    with pytest.MonkeyPatch.context() as patch:
        reasons: list[str] = []
        patch.setattr("engine.training.cuda_graph._warn", reasons.append)
        same = []
        for number in range(WARM + 4):
            a, b = (m.step(batch_of(*views(number))).parts["loss"].item() for m in (plain, recorded))
            same.append(a == b)
    if fault == "reads the loss":
        assert "not permitted" in reasons[0]
        assert all(same)
    else:
        assert not all(same)
