"""Recording and replaying a function, with a recorder that runs it again in place of a CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.graph import WARM, Graph
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.order import shuffled_rows
from tests.engine.small import batch_of, built, settings, views

CPU = torch.device("cpu")


class Recorder:
    """What a CUDA graph does, on the CPU: nothing when it is recorded; each replay writes over the same result."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], dict[str, torch.Tensor]]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        result: dict[str, torch.Tensor] = {}

        def replay() -> None:
            self.replayed += 1
            result.update(function())

        return replay, result


def test_inputs_are_copied_and_other_shapes_recorded_anew() -> None:
    seen, recorder = list[int](), Recorder()

    def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(inputs["x"].data_ptr())
        return {"y": 2 * inputs["x"]}

    graph = Graph(double, CPU, record=recorder)
    for size in (3, 5, 3):
        before = recorder.replayed
        for value in range(WARM + 3):
            x = torch.full((size,), float(value))
            assert torch.equal(graph({"x": x})["y"], 2 * x)
        assert recorder.replayed - before == 3
        assert len(set(seen[-3:])) == 1  # one place for the inputs of all replays
    assert recorder.recorded == 3


def test_a_shape_that_changes_while_warming_up_is_warmed_up_too() -> None:
    recorder, seen = Recorder(), list[int]()
    graph = Graph(lambda inputs: seen.append(len(inputs["x"])) or {}, CPU, record=recorder)
    for size in (3, 3, 5, 5, 5):
        graph({"x": torch.zeros(size)})
    assert recorder.recorded == 0
    graph({"x": torch.zeros(5)})
    assert recorder.recorded == 1


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
    graph = Graph(lambda inputs: kept.update(inputs) or {}, CPU, record=Recorder())
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


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_recorded_step_interleaved_with_measured_ones_trains_as_a_plain_one(shuffled: bool) -> None:
    """All that a step depends on is on the device, at the same place in every step: nothing of it is recorded."""
    terms = Terms(residual=Residual(), xmoco=XMoCo())
    chosen = settings(terms=terms, bn="shuffle" if shuffled else "plain", momentum_schedule="cosine")
    chosen = replace(chosen, optim=replace(chosen.optim, schedule="cosine", epochs=9, by="step"))
    plain, recorded = built(chosen), built(chosen)
    recorder = Recorder()
    step = recorded.step
    step._graph = Graph(step._take, CPU, step._reset, lambda f: as_result(recorder, f))
    for number in range(9):
        x1, x2 = views(number)
        order = shuffled_rows(0, number, len(x1))
        more: Any = {"shuffled": {0: x1[order], 1: x2[order]}, "order": order} if shuffled else {}
        results = [m.step(batch_of(x1, x2, **more), measured=number == 6) for m in (plain, recorded)]
        assert torch.equal(results[0].parts["loss"], results[1].parts["loss"])
    assert recorder.replayed == 9 - WARM - 1
    for a, b in zip(plain.step.encoder.parameters(), step.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.queue.keys, recorded.queue.keys)


def as_result(recorder: Recorder, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record a function that returns a dataclass."""
    replay, values = recorder(lambda: vars(function()))

    class Found:
        def __getattr__(self, name: str) -> Any:
            return values[name]

    return replay, Found()
