"""Compiled backbones train like eager ones, and are refused where nothing can compile them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from engine.config.settings import Optim
from engine.training import model as model_module
from engine.training.model import Model
from methods.co2 import CO2
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.system.errors import InputError
from tests.engine.small import BATCH, batch_of, built, settings, views

CASES = [
    ("moco_v2", Terms(), False),
    ("moco_v2", Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual()), False),
    ("moco_v2", Terms(), True),
    ("moco_v3", Terms(), False),
]


def train(model: Model, steps: int, batch: int = BATCH) -> list[float]:
    losses = []
    for seed in range(steps):
        given = [view.to(next(model.online.parameters())) for view in views(seed, batch)]
        losses.append(float(model.step(batch_of(*given)).parts["loss"]))
    return losses


def parts(model: Model) -> list[torch.nn.Module]:
    return [part for part in (model.step.encoder, model.target, model.queue) if part is not None]


def check_same(a: Model, b: Model, rtol: float, atol: float) -> None:
    """Compare online and momentum encoder, running statistics included."""
    for ours, theirs in ((a.step.encoder, b.step.encoder), (a.target, b.target)):
        assert ours is not None
        assert theirs is not None
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[key], value, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize(
    ("name", "terms", "recompute"),
    CASES,
)
@pytest.mark.slow
def test_compiled_backbones_train_like_eager_ones(name: str, terms: Terms, recompute: bool) -> None:
    """Losses, parameters, momentum parameters and running statistics are compared over 20 steps in float64."""
    chosen = settings(name, terms)
    eager, compiled = built(chosen), built(replace(chosen, compile=True, activation_checkpointing=recompute))
    assert train(compiled, 20) == pytest.approx(train(eager, 20), rel=1e-9)
    check_same(eager, compiled, 1e-8, 1e-10)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "terms", "lr"), [("moco_v2", CASES[1][1], 0.1), ("moco_v3", Terms(), 0.003)])
def test_float32_trains_like_float64(name: str, terms: Terms, lr: float, compiled: bool) -> None:
    """Losses and parameters over 20 steps, at rates at which training on noise does not amplify rounding."""
    chosen = replace(settings(name, terms, batch=32), optim=Optim(lr=lr, schedule="constant"))
    exact = built(chosen)
    rounded = model_module.build_model(replace(chosen, compile=compiled), Accelerator(cpu=True))
    for ours, theirs in zip(parts(rounded), parts(exact), strict=True):
        ours.load_state_dict(theirs.state_dict())
    assert train(rounded, 20, 32) == pytest.approx(train(exact, 20, 32), rel=1e-4)
    for ours, theirs in zip(parts(rounded), parts(exact), strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a.double() - b).norm() <= 1e-2 * b.norm()


@pytest.mark.slow
def test_backbones_are_compiled_once_for_each_size_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, counts = torch.nn.Module.compile, list[int]()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compile_(self, backend="eager", **given))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = built(replace(settings(), compile=True))
    for number, size in enumerate((8, 8, 8, 16, 16, 8, 16)):
        model.step(batch_of(*views(number, size=size)))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    first = counts[0]
    assert counts == [first] * 3 + [2 * first] * 4
    assert first == 2  # one of each encoder


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{"compile": True}, {"cuda_graph": True}, {"compile": True, "cuda_graph": True}])
@pytest.mark.parametrize(("name", "terms", "recompute"), CASES)
def test_compiled_and_graph_train_like_eager_on_a_gpu(
    name: str, terms: Terms, recompute: bool, way: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """20 steps in float64, without a fallback from the graph."""
    chosen = replace(settings(name, terms), activation_checkpointing=recompute)
    accelerator = Accelerator()
    eager, other = built(chosen, accelerator), built(replace(chosen, **way), accelerator)  # type: ignore[arg-type]
    assert train(other, 20) == pytest.approx(train(eager, 20), rel=1e-7)
    check_same(eager, other, 1e-6, 1e-8)
    assert "cuda_graph" not in capsys.readouterr().err  # no warning


def test_missing_compiler_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(model_module.shutil, "which", lambda name: None)
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
