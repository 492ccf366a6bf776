"""Measures of embeddings against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.monitoring.embedding_metrics import alignment, effective_rank, measure, spread, uniformity
from methods.base import Embeddings
from methods.registry import BASES
from tests.methods.formulas import unit


def test_spread_is_one_on_the_sphere_and_zero_in_a_point() -> None:
    assert spread(unit(4000, 64, seed=0)).item() == pytest.approx(1, abs=0.01)
    assert spread(unit(1, 8, seed=0).expand(10, 8)).item() == pytest.approx(0, abs=1e-12)
    q = unit(7, 5, seed=1)
    assert spread(q).item() == pytest.approx(np.sqrt(5) * np.std(q.numpy(), axis=0, ddof=1).mean(), abs=1e-12)


def test_alignment_and_uniformity_are_those_of_wang_and_isola() -> None:
    q, k = unit(6, 4, seed=1), unit(6, 4, seed=2)
    assert alignment(q, k).item() == pytest.approx(((q - k).norm(dim=1) ** 2).mean().item(), abs=1e-12)
    assert uniformity(q).item() == pytest.approx(torch.pdist(q).pow(2).mul(-2).exp().mean().log().item(), abs=1e-12)


def test_effective_rank_is_the_exponential_of_the_spectral_entropy() -> None:
    q = torch.cat([torch.eye(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)])
    assert effective_rank(q).item() == pytest.approx(6, abs=1e-9)
    assert effective_rank(q[:, :1] * torch.ones(1, 6)).item() == pytest.approx(1, abs=1e-5)
    z = unit(20, 7, seed=3)
    shares = np.linalg.svd((z - z.mean(0)).numpy(), compute_uv=False)
    shares = shares / shares.sum()
    assert effective_rank(z).item() == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), abs=1e-9)
    assert effective_rank(torch.ones(4, 3)).isfinite()


@pytest.mark.parametrize("queued", [True, False])
def test_measures_compare_one_view_with_its_keys(queued: bool) -> None:
    base = BASES["moco_v2" if queued else "moco_v3"]
    named = {name: unit(5, 4, seed=i) for i, name in enumerate(("q1", "q2", "k1", "k2"))}
    queue = unit(9, 4, seed=9) if queued else None
    measures = measure(Embeddings(named, queue), base)
    q, k = named["q1"], named["k2"]
    similarities = q @ k.T
    negative = (q @ queue.T).mean() if queue is not None else (similarities.sum() - similarities.trace()) / 20
    assert measures["positive_similarity"].item() == pytest.approx(similarities.trace().item() / 5, abs=1e-12)
    assert measures["negative_similarity"].item() == pytest.approx(negative.item(), abs=1e-12)
    gap = 1 - F.cosine_similarity(q, named["k1"]).mean().item()
    assert measures["student_teacher_gap"].item() == pytest.approx(gap, abs=1e-12)
    assert set(measures) == {
        "positive_similarity",
        "negative_similarity",
        "embedding_std",
        "alignment",
        "uniformity",
        "effective_rank",
        "student_teacher_gap",
    }


def test_simclr_has_no_student_teacher_gap() -> None:
    named = {name: unit(5, 4, seed=i) for i, name in enumerate(("q1", "q2"))}
    named |= {"k1": named["q1"], "k2": named["q2"]}
    assert "student_teacher_gap" not in measure(Embeddings(named), BASES["simclr"])
