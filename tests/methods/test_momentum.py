"""The momentum encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.heads import Encoder
from methods.momentum import cosine_momentum, momentum_copy, parameter_pairs, update


def small() -> Encoder:
    torch.manual_seed(0)
    return Encoder(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2), nn.Linear(2, 2)).double()


def test_copy_is_equal_apart_and_without_gradient_or_predictor() -> None:
    online = small()
    target = momentum_copy(online)
    assert [name for name, _ in online.named_parameters() if name not in dict(target.named_parameters())] == [
        "predictor.weight",
        "predictor.bias",
    ]
    for ours, theirs in zip(*parameter_pairs(target, online), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    assert not any(p.requires_grad for p in target.parameters())


def test_frozen_parameters_are_not_followed() -> None:
    online = small()
    online.backbone[0].requires_grad_(False)
    target = momentum_copy(online)
    assert [p.data_ptr() for p in parameter_pairs(target, online)[0]] == [
        p.data_ptr() for p in (*target.backbone[1].parameters(), *target.projector.parameters())
    ]


def test_cosine_momentum_rises_to_one() -> None:
    assert [cosine_momentum(0.9, t) for t in (0, 0.5, 1)] == pytest.approx([0.9, 0.95, 1], abs=1e-15)
    assert cosine_momentum(0.9, 1 / 3) == pytest.approx(0.925, abs=1e-15)


def test_update_is_the_moving_average_of_parameters_and_leaves_buffers() -> None:
    online = small()
    target = momentum_copy(online)
    online(torch.randn(8, 3, dtype=torch.float64))  # moves the online running statistics only
    with torch.no_grad():
        for p in online.parameters():
            p.normal_()
    before = [p.clone() for p in target.parameters()]
    buffers = [b.clone() for b in target.buffers()]
    followed = parameter_pairs(target, online)
    update(*followed, 0.99)
    for old, k, q in zip(before, *followed, strict=True):
        assert torch.allclose(k, 0.99 * old + 0.01 * q, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(buffers, target.buffers(), strict=True))
