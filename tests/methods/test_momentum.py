"""The momentum encoder."""

from __future__ import annotations

import torch
from torch import nn

from methods.momentum import momentum_copy, update


def test_copy_is_equal_apart_and_without_gradient() -> None:
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    target = momentum_copy(online)
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.parameters())
    with torch.no_grad():
        online[0].weight.zero_()
    assert not torch.equal(online[0].weight, target[0].weight)


def test_update_is_the_moving_average_of_parameters_and_leaves_buffers() -> None:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    target = momentum_copy(online)
    online(torch.randn(8, 3, dtype=torch.float64))  # moves the online running statistics only
    with torch.no_grad():
        for p in online.parameters():
            p.normal_()
    before = [p.clone() for p in target.parameters()]
    buffers = [b.clone() for b in target.buffers()]
    update(list(target.parameters()), list(online.parameters()), 0.99)
    for old, q, k in zip(before, online.parameters(), target.parameters(), strict=True):
        assert torch.allclose(k, 0.99 * old + 0.01 * q, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(buffers, target.buffers(), strict=True))
