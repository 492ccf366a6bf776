"""Compiled backbones train as eager ones do, and are refused where nothing can compile them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine import build
from engine.build import Model
from methods.co2 import CO2
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.errors import InputError
from tests.engine.small import batch_of, built, settings, views


def train(model: Model, steps: int) -> list[float]:
    return [float(model.step(batch_of(*views(seed))).parts["loss"]) for seed in range(steps)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "terms", "recompute"),
    [
        ("moco_v2", Terms(), False),
        ("moco_v2", Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual()), False),
        ("moco_v2", Terms(), True),
        ("moco_v3", Terms(), False),
    ],
)
def test_compiled_backbones_train_as_eager_ones(name: str, terms: Terms, recompute: bool) -> None:
    """In float64, over 20 steps: losses, parameters, momentum parameters, running statistics."""
    chosen = settings(name, terms)
    eager, compiled = built(chosen), built(replace(chosen, compile=True, recompute=recompute))
    assert train(compiled, 20) == pytest.approx(train(eager, 20), rel=1e-9)
    for a, b in ((eager.step.encoder, compiled.step.encoder), (eager.target, compiled.target)):
        assert a is not None
        assert b is not None
        assert list(a.state_dict()) == list(b.state_dict())
        for key, value in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[key], value, rtol=1e-8, atol=1e-10)


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
