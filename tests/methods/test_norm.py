"""Split BatchNorm against plain BatchNorm on each part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.norm import SplitBatchNorm, count_batches


@pytest.mark.parametrize(("batch", "groups"), [(16, 8), (12, 8), (7, 4), (2, 8)])
def test_each_part_has_its_own_statistics(batch: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = SplitBatchNorm(5, groups).double()
    nn.init.uniform_(layer.weight)
    x = torch.randn(batch, 5, 4, 4, dtype=torch.float64)
    parts = max(g for g in range(1, groups + 1) if batch % g == 0 and (batch // g >= 2 or g == 1))
    expected = []
    for part in x.chunk(parts):
        mean = part.mean(dim=(0, 2, 3), keepdim=True)
        var = part.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
        expected.append((part - mean) / (var + 1e-5).sqrt() * layer.weight.view(1, -1, 1, 1))
    assert torch.allclose(layer(x), torch.cat(expected), atol=1e-12)


def test_running_statistics_move_as_far_as_in_one_update() -> None:
    layer, plain = SplitBatchNorm(3, 4), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 8, 8).repeat(4, 1, 1, 1) + 2  # equal parts, so that the statistics agree
    layer(x)
    plain(x)
    assert torch.allclose(layer.running_mean, plain.running_mean, atol=1e-6)
    count_batches(layer, 2)
    assert layer.num_batches_tracked == 2


def test_evaluation_equals_plain_batchnorm() -> None:
    layer, plain = SplitBatchNorm(3, 4), nn.BatchNorm2d(3)
    layer(torch.randn(8, 3, 4, 4))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_vectors_are_split_like_images() -> None:
    torch.manual_seed(0)
    layer = SplitBatchNorm(5, 2, affine=False).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    expected = [(p - p.mean(0)) / (p.var(0, unbiased=False) + 1e-5).sqrt() for p in x.chunk(2)]
    assert torch.allclose(layer(x), torch.cat(expected), atol=1e-12)
    assert layer.weight is None
