"""Nearest neighbors and their votes against scikit-learn and loops, in blocks and in shards."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from engine.evaluate import nearest_neighbors
from engine.evaluate.nearest_neighbors import classify, neighbors, vote
from tests.gloo import on_ranks


@pytest.mark.parametrize(("k", "temperature"), list(itertools.product((1, 10, 20, 100, 200), (0.07, 0.1))))
def test_votes_equal_scikit_learns(k: int, temperature: float) -> None:
    classifiers = pytest.importorskip("sklearn.neighbors")
    random = np.random.default_rng(k)
    labels = random.integers(0, 7, 900)
    means = random.normal(size=(7, 16))
    features = F.normalize(torch.from_numpy(means[labels] + 2 * random.normal(size=(900, 16))), dim=1)
    bank, queries, bank_labels = features[:600], features[600:], torch.from_numpy(labels[:600])
    similarity, nearest = neighbors(queries, bank, bank_labels, k)
    ranked = vote(similarity, nearest, temperature, 7)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    reference = classifiers.KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    reference.fit(bank.numpy(), bank_labels.numpy())
    assert (ranked[:, 0].numpy() == reference.predict(queries.numpy())).all()
    probabilities = reference.predict_proba(queries.numpy())
    for row, probability in zip(ranked.numpy(), probabilities, strict=True):
        voted = row[row >= 0]
        assert (np.diff(probability[reference.classes_.searchsorted(voted)]) <= 1e-12).all()
        assert len(voted) == min(5, (probability > 0).sum())


@pytest.mark.parametrize(("k", "temperature", "rows"), [(1, 0.1, 7), (5, 0.07, 100), (20, 1.0, 1), (500, 0.1, 16)])
def test_classes_equal_a_loop_over_neighbors(
    k: int, temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_neighbors, "_MAX_ROWS", rows)
    generator = torch.Generator().manual_seed(k)
    bank = F.normalize(torch.randn(120, 6, generator=generator), dim=1)
    queries = F.normalize(torch.randn(33, 6, generator=generator), dim=1)
    labels = torch.randint(0, 4, (120,), generator=generator)
    classes = classify(queries, bank, labels, k=k, temperature=temperature, classes=4)
    for query, predicted in zip(queries, classes.tolist(), strict=True):
        similarity = (bank @ query).tolist()
        nearest = sorted(range(120), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * 4
        for i in nearest:
            votes[labels[i]] += math.exp(similarity[i] / temperature)
        assert predicted == max(range(4), key=lambda c: votes[c])


def test_a_small_temperature_takes_the_nearest() -> None:
    """exp(1 / 0.001) is not finite; of two equal classes, that of the nearest wins."""
    similarity, nearest = torch.tensor([[0.9, 0.8, 0.8], [1.0, 1.0, 0.9]]), torch.tensor([[2, 0, 1], [3, 1, 0]])
    assert vote(similarity, nearest, 1e-3, 4)[:, 0].tolist() == [2, 1]
    assert vote(similarity, nearest, 1e-3, 4)[1, :3].tolist() == [1, 3, 0]


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = (F.normalize(torch.randn(n, 8), dim=1) for n in (50, 31))
    labels = torch.arange(50) % 3
    at_once = neighbors(queries, bank, labels, 5)
    monkeypatch.setattr(nearest_neighbors, "_MAX_ELEMENTS", 200)
    in_blocks = neighbors(queries, bank, labels, 5)
    assert torch.allclose(at_once[0], in_blocks[0])
    assert torch.equal(at_once[1], in_blocks[1])


def _search_in_shards() -> None:
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    queries, bank = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (50, 81))
    expected = neighbors(queries, bank, torch.arange(81), 5)
    nearest_neighbors._MAX_ELEMENTS = 120  # blocks of 3 queries for a shard of 40, and of 2 for one of 41
    shard = slice(0, 40) if accelerator.is_main_process else slice(40, 81)
    merged = neighbors(queries, bank[shard], torch.arange(81)[shard], 5, sharded=True)
    torch.testing.assert_close(merged[0], expected[0])
    assert torch.equal(merged[1], expected[1])


def test_shards_of_other_lengths_are_searched_in_the_same_blocks() -> None:
    on_ranks(2, _search_in_shards)
