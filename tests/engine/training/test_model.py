"""A run's networks follow its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn

from engine.config.settings import Model
from engine.training.model import build_model, needed_views
from methods.norm import SplitBatchNorm
from methods.registry import Terms
from methods.residual import Residual
from tests.engine.training.runs import settings


def test_settings_reach_the_networks() -> None:
    chosen = settings(Path("unused"), "plain")
    chosen = replace(
        chosen,
        model=replace(chosen.model, zero_init_residual=True),
        method=replace(chosen.method, queue_dtype="bfloat16"),
    )
    model = build_model(chosen, Accelerator(cpu=True))
    assert model.queue is not None
    assert str(model.queue.keys.dtype) == "torch.bfloat16"
    assert model.step.encoder.backbone.layer1[0].bn2.weight.abs().sum() == 0


def test_settings_reach_a_transformer() -> None:
    chosen = settings(Path("unused"), "plain")
    chosen = replace(
        chosen, data=replace(chosen.data, size=32), model=Model("vit_small", dim=16, stop_grad_conv1=False)
    )
    backbone = build_model(chosen, Accelerator(cpu=True)).step.encoder.backbone
    assert all(p.requires_grad for p in backbone.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize(("bn", "accumulate", "groups"), [("split", 1, {8}), ("shuffle", 2, {4}), ("plain", 1, set())])
def test_batchnorms_groups_are_parts_of_a_forward_pass(bn: str, accumulate: int, groups: set[int]) -> None:
    chosen = replace(settings(Path("unused"), bn), gradient_accumulation_steps=accumulate)
    model = build_model(chosen, Accelerator(cpu=True))
    assert {m.groups for m in model.online.modules() if isinstance(m, SplitBatchNorm)} == groups


@pytest.mark.parametrize(
    ("terms", "symmetric", "queries", "keys"),
    [
        (Terms(), False, {0}, {1}),
        (Terms(residual=Residual()), False, {0}, {0, 1}),
        (Terms(), True, {0, 1}, {0, 1}),
    ],
)
def test_needed_views_are_those_of_the_objective(
    terms: Terms, symmetric: bool, queries: set[int], keys: set[int]
) -> None:
    chosen = settings(Path("unused"), "plain", terms, symmetric=symmetric)
    assert (needed_views(chosen, "qQ"), needed_views(chosen, "kK")) == (queries, keys)
    assert needed_views(chosen) == queries | keys
