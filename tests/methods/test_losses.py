"""Every loss against its formula as a float64 loop: values, gradients, where gradient flows, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from methods.byol import regression_loss
from methods.co2 import consistency
from methods.dcl import decoupled_info_nce
from methods.moco import info_nce
from methods.mocov3 import contrastive_loss
from methods.residual import gap
from methods.simclr import nt_xent
from methods.xmoco import cross_similarity, uniformity
from tests.methods import formulas
from tests.methods.formulas import Rows, unit

Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of (q, k, negatives)."""

    ours: Loss
    loop: Callable[[Rows, Rows, Rows], float]
    queued: bool
    """Negatives are a queue; otherwise they are k again."""
    keys_have_gradient: bool = False


T = 0.13
CASES = {
    "info_nce": Case(lambda q, k, n: info_nce(q, k, n, T), lambda q, k, n: formulas.info_nce(q, k, n, T), queued=True),
    "contrastive": Case(
        lambda q, k, n: contrastive_loss(q, k, T), lambda q, k, n: formulas.in_batch(q, k, T), queued=False
    ),
    "regression": Case(
        lambda q, k, n: regression_loss(F.normalize(q, dim=1), k), lambda q, k, n: formulas.byol(q, k), queued=False
    ),
    "co2, queue": Case(lambda q, k, n: consistency(q, k, n, T), lambda q, k, n: formulas.co2(q, k, n, T), queued=True),
    "co2, batch": Case(
        lambda q, k, n: consistency(q, k, n, T, 0), lambda q, k, n: formulas.co2(q, k, n, T, 0), queued=False
    ),
    "cross, mse": Case(
        lambda q, k, n: cross_similarity(q, k, q, k), lambda q, k, n: formulas.cross_mse(q, k), queued=False
    ),
    "cross, kl": Case(
        lambda q, k, n: cross_similarity(q, k, q, k, "kl", T), lambda q, k, n: formulas.cross_kl(q, k, T), queued=False
    ),
    "uniformity, queue": Case(
        lambda q, k, n: uniformity(q, n, T), lambda q, k, n: formulas.uniformity(q, n, T), queued=True
    ),
    "uniformity, batch": Case(
        lambda q, k, n: uniformity(q, n, T, 0), lambda q, k, n: formulas.uniformity(q, n, T, 0), queued=False
    ),
    "residual": Case(lambda q, k, n: gap(q, k), lambda q, k, n: formulas.residual(q, k), queued=False),
    "dcl, queue": Case(
        lambda q, k, n: decoupled_info_nce(q, k, n, T),
        lambda q, k, n: formulas.dcl(q, k, n, T),
        queued=True,
        keys_have_gradient=True,
    ),
    "dcl, batch": Case(
        lambda q, k, n: decoupled_info_nce(q, k, n, T, 0),
        lambda q, k, n: formulas.dcl(q, k, n, T, 0),
        queued=False,
        keys_have_gradient=True,
    ),
    "dcl, both views": Case(
        lambda q, k, n: decoupled_info_nce(q, k, n, T, 0, q),
        lambda q, k, n: formulas.dcl(q, k, n, T, 0, q),
        queued=False,
        keys_have_gradient=True,
    ),
    "nt_xent": Case(
        lambda q, k, n: (nt_xent(q, k, q, T) + nt_xent(k, q, k, T)) / 2,
        lambda q, k, n: formulas.nt_xent(q, k, T),
        queued=False,
        keys_have_gradient=True,
    ),
}
SHAPES = [(4, 8, 7), (3, 5, 16), (2, 2, 1), (6, 3, 10)]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def inputs(case: Case, batch: int, dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = unit(batch, dim, seed=batch), unit(batch, dim, seed=batch + 100)
    return q, k, unit(length, dim, seed=length + 200) if case.queued else k


@every_case
@pytest.mark.parametrize(("batch", "dim", "length"), SHAPES)
def test_value_equals_the_formula(case: Case, batch: int, dim: int, length: int) -> None:
    q, k, negatives = inputs(case, batch, dim, length)
    assert abs(case.ours(q, k, negatives).item() - case.loop(q.tolist(), k.tolist(), negatives.tolist())) < 1e-10


@every_case
def test_gradient_equals_central_differences_of_the_formula(case: Case) -> None:
    """Richardson's extrapolation from three step widths has an error of the sixth order."""
    q, k, negatives = inputs(case, 3, 4, 5)
    q.requires_grad_()
    case.ours(q, k.detach(), negatives.detach()).backward()
    assert q.grad is not None
    fixed = (k.tolist(), negatives.tolist())

    def slope(i: int, j: int, h: float) -> float:
        ends = []
        for shift in (h, -h):
            rows = q.detach().tolist()
            rows[i][j] += shift
            ends.append(case.loop(rows, *fixed))
        return (ends[0] - ends[1]) / (2 * h)

    for i in range(3):
        for j in range(4):
            fine, middle, coarse = (slope(i, j, h) for h in (5e-4, 1e-3, 2e-3))
            expected = (64 * fine - 20 * middle + coarse) / 45
            assert q.grad[i, j].item() == pytest.approx(expected, abs=1e-8)


@every_case
@pytest.mark.parametrize("seed", range(5))
def test_value_equals_the_formula_for_random_shapes_and_temperatures(case: Case, seed: int, monkeypatch: Any) -> None:
    generator = np.random.default_rng(seed)
    monkeypatch.setattr(f"{__name__}.T", float(np.exp(generator.uniform(np.log(0.05), np.log(2)))))
    batch, dim, length = (int(n) for n in generator.integers((2, 2, 1), (9, 12, 30)))
    q, k, negatives = inputs(case, batch, dim, length)
    assert abs(case.ours(q, k, negatives).item() - case.loop(q.tolist(), k.tolist(), negatives.tolist())) < 1e-10


@every_case
def test_gradcheck(case: Case) -> None:
    q, k, negatives = inputs(case, 3, 4, 5)
    assert torch.autograd.gradcheck(lambda q: case.ours(q, k, negatives), (q.requires_grad_(),), atol=1e-8)


@every_case
def test_gradient_reaches_queries_but_neither_keys_nor_queue(case: Case) -> None:
    q, k, negatives = (x.clone().requires_grad_() for x in inputs(case, 4, 6, 5))
    case.ours(q, k, negatives).backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0
    if not case.keys_have_gradient:
        assert k.grad is None
        assert negatives.grad is None


@every_case
def test_loss_is_float32_under_autocast(case: Case) -> None:
    q, k, negatives = (x.float() for x in inputs(case, 8, 16, 64))
    expected = case.ours(q, k, negatives)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.ours(q, k, negatives), expected)
    assert case.ours(q.bfloat16(), k.bfloat16(), negatives.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["co2, batch", "uniformity, batch", "contrastive", "nt_xent", "dcl, batch"])
def test_losses_of_the_ranks_average_to_the_loss_of_the_batch(name: str) -> None:
    """Each rank has its own queries, all keys, and the row of its first own key."""
    q, k = unit(6, 5, seed=1), unit(6, 5, seed=2)
    parts: dict[str, Callable[[int], torch.Tensor]] = {
        "co2, batch": lambda r: consistency(q[r : r + 2], k[r : r + 2], k, T, r),
        "uniformity, batch": lambda r: uniformity(q[r : r + 2], k, T, r),
        "contrastive": lambda r: contrastive_loss(q[r : r + 2], k, T, r),
        "nt_xent": lambda r: (nt_xent(q[r : r + 2], k, q, T, r) + nt_xent(k[r : r + 2], q, k, T, r)) / 2,
        "dcl, batch": lambda r: decoupled_info_nce(q[r : r + 2], k[r : r + 2], k, T, r),
    }
    mean = torch.stack([parts[name](r) for r in (0, 2, 4)]).mean()
    assert mean.item() == pytest.approx(CASES[name].loop(q.tolist(), k.tolist(), k.tolist()), abs=1e-10)


@pytest.mark.parametrize("name", ["info_nce", "co2, queue", "uniformity, queue", "dcl, queue"])
def test_no_float32_copy_of_a_bfloat16_queue_is_saved(name: str) -> None:
    q, k, queue = (unit(*s, seed=i).float() for i, s in enumerate(((4, 8), (4, 8), (500, 8))))
    saved: list[torch.Tensor] = []
    grads = []
    for stored in (queue.bfloat16(), queue.bfloat16().float()):
        leaf = q.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = CASES[name].ours(leaf, k, stored)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
        if stored.dtype == torch.bfloat16:
            assert not any(t.ndim and t.shape[0] == 500 and t.dtype == torch.float32 for t in saved)
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-7)
