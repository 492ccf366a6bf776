"""MoCo's loss against the formula written as a loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from methods.moco import MoCo, info_nce


def unit(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def loop(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, t: float) -> float:
    losses = []
    for i in range(len(q)):
        positive = math.exp(float(q[i] @ k[i]) / t)
        negatives = sum(math.exp(float(q[i] @ n) / t) for n in queue)
        losses.append(-math.log(positive / (positive + negatives)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("batch", "dim", "length", "t"), [(4, 8, 16, 0.2), (3, 5, 7, 0.07), (1, 2, 1, 1.0)])
def test_info_nce_equals_the_formula(batch: int, dim: int, length: int, t: float) -> None:
    q, k, queue = unit(batch, dim, seed=1), unit(batch, dim, seed=2), unit(length, dim, seed=3)
    assert abs(info_nce(q, k, queue, t).item() - loop(q, k, queue, t)) < 1e-10


def test_gradient_is_right_and_reaches_the_queries_alone() -> None:
    q, k, queue = (unit(*s, seed=i).requires_grad_() for i, s in enumerate(((3, 4), (3, 4), (5, 4))))
    assert torch.autograd.gradcheck(lambda q: info_nce(q, k, queue, 0.2), (q,), atol=1e-8)
    info_nce(q, k, queue, 0.2).backward()
    assert q.grad is not None
    assert k.grad is None
    assert queue.grad is None


def test_is_computed_in_float32_under_autocast() -> None:
    q, k, queue = (unit(*s, seed=i).float() for i, s in enumerate(((8, 16), (8, 16), (64, 16))))
    expected = info_nce(q, k, queue, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(q, k, queue, 0.07), expected)
    half = info_nce(q.bfloat16(), k.bfloat16(), queue, 0.07)
    assert half.dtype == torch.float32


def test_asymmetric_loss_needs_two_embeddings_and_symmetric_averages_both_ways() -> None:
    queue = unit(9, 6, seed=0)
    e = {name: unit(4, 6, seed=i) for i, name in enumerate(("q1", "q2", "k1", "k2"), start=1)}
    asymmetric, symmetric = MoCo(0.2, symmetric=False), MoCo(0.2, symmetric=True)
    assert asymmetric.needs == {"q1", "k2"}
    assert symmetric.needs == {"q1", "q2", "k1", "k2"}
    one, other = loop(e["q1"], e["k2"], queue, 0.2), loop(e["q2"], e["k1"], queue, 0.2)
    assert abs(asymmetric(e, queue)["info_nce"].item() - one) < 1e-10
    assert abs(symmetric(e, queue)["info_nce"].item() - (one + other) / 2) < 1e-10
    assert symmetric.enqueued(e) is e["k2"]
