"""XMoCo's identities and its choice of negatives."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from methods.base import IncompatibleTerm
from methods.registry import BASES
from methods.xmoco import XMoCo, cross_similarity, uniformity
from tests.methods import formulas
from tests.methods.formulas import unit
from tests.methods.test_base import QUEUE, embeddings


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_cross_similarity_is_zero_for_symmetric_similarities(form: Literal["mse", "kl"]) -> None:
    q, k = unit(5, 4, seed=1), unit(5, 4, seed=2)
    assert cross_similarity(q, q, q, q, form).item() == pytest.approx(0, abs=1e-15)
    assert cross_similarity(q, k, q, k, form) > 1e-4


def test_uniformity_is_zero_for_equal_similarities() -> None:
    q = F.normalize(torch.tensor([[1.0, 0, 0], [-2, 0, 0]], dtype=torch.float64), dim=1)
    ring = torch.tensor([[0.6, 0.8, 0], [0.6, -0.8, 0], [0.6, 0, 0.8]], dtype=torch.float64)
    assert uniformity(q, ring, 0.13).item() == pytest.approx(0, abs=1e-14)
    assert uniformity(q, unit(3, 3, seed=0), 0.13) > 1e-3


def test_uniformity_over_the_queue_needs_a_queue() -> None:
    base = BASES["moco_v2"]
    term = XMoCo(cross=0, negatives="queue")
    e = embeddings(base)
    value = term(e, base)["xmoco_uniformity"].value.item()
    assert value == pytest.approx(formulas.uniformity(e["q1"].tolist(), QUEUE.tolist(), 0.2), abs=1e-10)
    assert term.needs(base) == {"q1"}
    with pytest.raises(IncompatibleTerm, match="byol has no queue"):
        term.needs(BASES["byol"])
