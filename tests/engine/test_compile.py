"""Compiled backbones train as eager ones do, and are refused where nothing can compile them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from engine import build
from engine.build import Model
from methods.co2 import CO2
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.errors import InputError
from tests.engine.small import batch_of, built, settings, views

CASES = [
    ("moco_v2", Terms(), False),
    ("moco_v2", Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual()), False),
    ("moco_v2", Terms(), True),
    ("moco_v3", Terms(), False),
]


def train(model: Model, steps: int) -> list[float]:
    found = []
    for seed in range(steps):
        given = [view.to(next(model.online.parameters())) for view in views(seed)]
        found.append(float(model.step(batch_of(*given)).parts["loss"]))
    return found


def parts(model: Model) -> list[torch.nn.Module]:
    assert model.target is not None
    assert model.queue is not None
    return [model.step.encoder, model.target, model.queue]


def check_same(a: Model, b: Model, rtol: float, atol: float) -> None:
    """Compare online and momentum encoder, running statistics included."""
    for ours, theirs in ((a.step.encoder, b.step.encoder), (a.target, b.target)):
        assert ours is not None
        assert theirs is not None
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[key], value, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "terms", "recompute"), CASES)
def test_compiled_backbones_train_as_eager_ones(name: str, terms: Terms, recompute: bool) -> None:
    """In float64, over 20 steps: losses, parameters, momentum parameters, running statistics."""
    chosen = settings(name, terms)
    eager, compiled = built(chosen), built(replace(chosen, compile=True, recompute=recompute))
    assert train(compiled, 20) == pytest.approx(train(eager, 20), rel=1e-9)
    check_same(eager, compiled, 1e-8, 1e-10)


@pytest.mark.slow
def test_float32_trains_as_float64_for_a_while() -> None:
    """Eager and compiled, over 20 steps: rounding grows with them."""
    chosen = settings("moco_v2", Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual()))
    exact, rounded = built(chosen), []
    for compiled in (False, True):
        model = build.build_model(replace(chosen, compile=compiled), Accelerator(cpu=True))
        for ours, theirs in zip(parts(model), parts(exact), strict=True):
            ours.load_state_dict(theirs.state_dict())
        rounded.append(model)
    expected = train(exact, 20)
    for model in rounded:
        assert train(model, 20) == pytest.approx(expected, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{"compile": True}, {"cuda_graph": True}, {"compile": True, "cuda_graph": True}])
@pytest.mark.parametrize(("name", "terms", "recompute"), CASES)
def test_compiled_and_graph_train_as_eager_on_a_gpu(
    name: str, terms: Terms, recompute: bool, way: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """In float64, over 20 steps; and that it was a graph that ran."""
    chosen = replace(settings(name, terms), recompute=recompute)
    accelerator = Accelerator()
    eager, other = built(chosen, accelerator), built(replace(chosen, **way), accelerator)  # type: ignore[arg-type]
    assert train(other, 20) == pytest.approx(train(eager, 20), rel=1e-7)
    check_same(eager, other, 1e-6, 1e-8)
    assert "cuda_graph" not in capsys.readouterr().err  # which would say why there is none


def test_without_a_compiler_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"compile true: there is no C\+\+ compiler: install g\+\+"):
        built(replace(settings(), compile=True))


def test_both_encoders_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: seen.append((self, given)))
    model = built(replace(settings(), compile=True))
    assert model.target is not None
    assert [module for module, _ in seen] == [model.step.encoder.backbone, model.target.backbone]
    built(settings())
    assert len(seen) == 2
