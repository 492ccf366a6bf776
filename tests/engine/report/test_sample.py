"""Samples of data sets, and nearest neighbors against a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.report.sample import QUERIES, agreement, chance_agreement, draw_sample, nearest
from pipeline.beton import Beton


@pytest.mark.parametrize("k", [1, 5, 39])
def test_neighbors_equal_a_loop(k: int) -> None:
    rows = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(k)), dim=1)
    labels = np.arange(40) % 3
    queries = np.array([7, 0, 39])
    near = nearest(rows, queries, k)
    for query, cosines, positions in zip(queries, *near, strict=True):
        similar = [(float(rows[query] @ rows[other]), other) for other in range(40) if other != query]
        expected = sorted(similar, reverse=True)[:k]
        assert [other for _, other in expected] == positions.tolist()
        assert [cosine for cosine, _ in expected] == pytest.approx(cosines.tolist(), abs=1e-6)
    right = [labels[other] == labels[q] for q in range(40) for other in nearest(rows, np.array([q]), k).positions[0]]
    assert agreement(rows, labels, k) == pytest.approx(np.mean(right))
    assert chance_agreement(labels) == pytest.approx(
        np.mean([labels[a] == labels[b] for a in range(40) for b in range(40) if a != b])
    )


def test_a_query_among_its_copies_is_excluded() -> None:
    rows = F.normalize(torch.ones(30, 4), dim=1)
    near = nearest(rows, np.array([0, 29]), 3)
    assert near.positions.shape == (2, 3)
    assert 0 not in near.positions[0].tolist()
    assert 29 not in near.positions[1].tolist()


def test_a_sample_has_enough_images_of_each_class(drawn: Path) -> None:
    beton = Beton(drawn)
    one, again, other = (draw_sample(beton, 60, 1.0, seed) for seed in (0, 0, 1))
    assert one.ids.tolist() == again.ids.tolist() != other.ids.tolist()
    assert len(set(one.ids.tolist())) == 60
    assert one.labels.tolist() == beton.labels[one.ids].tolist()
    assert np.bincount(one.labels).tolist() == [6] * 10
    assert len(set(one.labels[one.queries].tolist())) == QUERIES
    beton.labels[:] = np.arange(200) // 2  # two images of each of 100 classes
    assert np.unique(draw_sample(beton, 60, 1.0, 0).labels, return_counts=True)[1].tolist() == [2] * 30
    beton.labels[:] = -1
    assert not draw_sample(beton, 60, 1.0, 0).labeled
