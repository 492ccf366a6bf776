"""The momentum encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.heads import Encoder
from methods.momentum import MovingAverage, cosine_momentum, momentum_copy


def small() -> Encoder:
    torch.manual_seed(0)
    return Encoder(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2), nn.Linear(2, 2)).double()


def test_copy_has_equal_parameters_without_gradient_and_predictor() -> None:
    online = small()
    target = momentum_copy(online)
    assert [name for name, _ in online.named_parameters() if name not in dict(target.named_parameters())] == [
        "predictor.weight",
        "predictor.bias",
    ]
    for name, ours in target.named_parameters():
        assert torch.equal(ours, online.get_parameter(name))
        assert ours.data_ptr() != online.get_parameter(name).data_ptr()
    assert not any(p.requires_grad for p in target.parameters())


def test_frozen_parameters_are_left_out() -> None:
    online = small()
    online.backbone[0].requires_grad_(False)
    target = momentum_copy(online)
    frozen, moving = target.backbone[0].weight.clone(), target.projector.weight.clone()
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1)
    MovingAverage(target, online).update(0.5)
    assert torch.equal(target.backbone[0].weight, frozen)
    assert torch.equal(target.projector.weight, moving + 0.5)


def test_cosine_momentum_rises_to_one() -> None:
    assert [cosine_momentum(0.9, t) for t in (0, 0.5, 1)] == pytest.approx([0.9, 0.95, 1], abs=1e-15)
    assert cosine_momentum(0.9, 1 / 3) == pytest.approx(0.925, abs=1e-15)


@pytest.mark.parametrize("share", [0.01, torch.tensor(0.01, dtype=torch.float64)])
def test_update_averages_parameters_and_leaves_buffers(share: float | torch.Tensor) -> None:
    online = small()
    target = momentum_copy(online)
    online(torch.randn(8, 3, dtype=torch.float64))  # changes the online running statistics alone
    with torch.no_grad():
        for p in online.parameters():
            p.normal_()
    before = [p.clone() for p in target.parameters()]
    buffers = [b.clone() for b in target.buffers()]
    MovingAverage(target, online).update(share)
    for old, (name, k) in zip(before, target.named_parameters(), strict=True):
        q = online.get_parameter(name)
        assert torch.allclose(k, 0.99 * old + 0.01 * q, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(buffers, target.buffers(), strict=True))
