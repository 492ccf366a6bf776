"""Tests of the sample order and its sharding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.sampling import order as order_module
from pipeline.sampling.order import (
    CHUNK,
    WINDOW,
    epoch_order,
    ordered,
    quasi_random_order,
    rank_slice,
    shuffled_rows,
    steps_per_epoch,
)
from pipeline.system.counter_rng import mix, stream

# ---- the order ----


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_order_is_a_permutation(n: int) -> None:
    order = epoch_order(7, 3, n)
    assert order.dtype == np.int64
    assert np.sort(order).tolist() == list(range(n))


def test_order_depends_on_its_arguments_alone() -> None:
    first = epoch_order(7, 3, 500)
    np.random.default_rng(0).random(10)
    epoch_order(8, 4, 900)
    assert first.tolist() == epoch_order(7, 3, 500).tolist()


@pytest.mark.parametrize(
    ("seed", "epoch", "n", "first"),
    [
        (7, 3, 1000, [624, 328, 234, 555, 757, 892, 397, 236, 746, 117]),
        (0, 0, 1281167, [1162081, 524132, 184224, 985185, 1196811, 212893]),
        (2**64 - 1, 2**40, 5, [2, 4, 3, 1, 0]),
    ],
)
def test_order_never_changes(seed: int, epoch: int, n: int, first: list[int]) -> None:
    """A change means that no earlier run can be resumed or repeated."""
    assert epoch_order(seed, epoch, n)[: len(first)].tolist() == first


def test_order_equals_a_plain_sort_by_splitmix64_keys() -> None:
    def finalize(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    key = finalize(finalize(int.from_bytes(b"order", "big") ^ 11) ^ 5)
    keys = [finalize((key + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(300)]
    assert epoch_order(11, 5, 300).tolist() == sorted(range(300), key=lambda i: (keys[i], i))


def test_equal_keys_are_ordered_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipeline.sampling.order.stream", lambda key, count: np.arange(count, dtype=np.uint64) // np.uint64(50)
    )
    assert epoch_order(0, 0, 500).tolist() == list(range(500))


def test_another_seed_or_epoch_gives_an_unrelated_order() -> None:
    orders = [epoch_order(seed, epoch, 2000) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 8  # one common position is expected
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(2000)


def test_every_id_is_equally_likely_at_every_position() -> None:
    """Chi-square of id by position over 4,000 seeds: 81 degrees of freedom, above 139 once in 10,000 times."""
    n, runs = 10, 4000
    counts = np.zeros((n, n))
    for seed in range(runs):
        counts[np.arange(n), epoch_order(seed, 0, n)] += 1
    expected = runs / n
    assert ((counts - expected) ** 2 / expected).sum() < 139
    assert ((counts[0] - expected) ** 2 / expected).sum() < 33.7  # the first position alone: 9 degrees of freedom


def test_first_id_is_near_uniform_over_epochs() -> None:
    n, runs = 20, 4000
    counts = np.bincount([epoch_order(1, epoch, n)[0] for epoch in range(runs)], minlength=n)
    assert ((counts - runs / n) ** 2 / (runs / n)).sum() < 50.8  # 19 degrees of freedom, once in 10,000 times


# ---- its sharding ----


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_slices_of_all_ranks_are_the_global_batch(world: int) -> None:
    order, batch = epoch_order(7, 3, 103), 12
    for step in range(steps_per_epoch(103, batch)):
        slices = [rank_slice(order, step, batch, rank, world) for rank in range(world)]
        assert {len(part) for part in slices} == {batch // world}
        assert np.concatenate(slices).tolist() == order[step * batch : (step + 1) * batch].tolist()


@pytest.mark.parametrize(("n", "batch", "steps"), [(103, 12, 8), (96, 12, 8), (12, 12, 1), (11, 12, 0)])
def test_an_epoch_has_only_full_batches(n: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(n, batch) == steps


@pytest.mark.parametrize(("batch", "world"), [(10, 3), (4, 8), (255, 2)])
def test_a_batch_not_divisible_by_the_world_size_is_refused(batch: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"{batch} does not divide among {world} ranks") as caught:
        rank_slice(epoch_order(0, 0, 1000), 0, batch, 0, world)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shuffled_rows_are_a_permutation_within_each_part(parts: int) -> None:
    order = shuffled_rows(3, 17, 32, parts)
    for part, rows in enumerate(np.split(order, parts)):
        assert sorted(rows) == list(range(part * 32 // parts, (part + 1) * 32 // parts))
    assert not np.array_equal(order, np.arange(32))
    assert np.array_equal(order, shuffled_rows(3, 17, 32, parts))
    for other in (shuffled_rows(4, 17, 32, parts), shuffled_rows(3, 18, 32, parts)):
        assert not np.array_equal(order, other)


def test_shuffled_rows_are_sorted_by_splitmix64_keys() -> None:
    key = mix(mix(np.uint64(0x73687566) ^ np.uint64(5)) ^ np.uint64(9))
    keys = [int(word) for word in stream(key, 50)]
    assert shuffled_rows(5, 9, 50).tolist() == sorted(range(50), key=lambda i: keys[i])


def test_a_batch_not_divisible_by_the_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        shuffled_rows(0, 0, 10, 4)


# ---- quasi-random order ----


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 40_000])
@pytest.mark.parametrize(("chunk", "window"), [(16, 4), (7, 30), (CHUNK, WINDOW)])
def test_quasi_random_order_depends_on_seed_and_epoch_alone(
    n: int, chunk: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "CHUNK", chunk)
    monkeypatch.setattr(order_module, "WINDOW", window)
    order = quasi_random_order(3, 5, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == quasi_random_order(3, 5, n).tolist()
    if n >= 1000:
        for seed, epoch in ((3, 6), (4, 5)):
            assert order.tolist() != quasi_random_order(seed, epoch, n).tolist()


def test_a_window_reads_few_chunks_and_each_chunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    window, n = 10, 20_000
    monkeypatch.setattr(order_module, "WINDOW", window)
    order = quasi_random_order(0, 0, n)
    parts = [order[i : i + CHUNK * window] // CHUNK for i in range(0, n, CHUNK * window)]
    assert all(len(np.unique(part)) <= window + 1 for part in parts)
    repeated = [set(a.tolist()) & set(b.tolist()) for a, b in itertools.combinations(parts, 2)]
    assert sum(map(len, repeated)) <= 2  # by the file's last, shorter chunk
    distances = np.abs(np.diff(np.concatenate([np.unique(part) for part in parts])))
    assert np.median(distances) > 10  # the chunks of a window are spread over the file


def test_quasi_random_order_mixes_imagenet_nearly_as_well_as_a_full_shuffle() -> None:
    """Sorted by class: classes in a batch of 256 and in a queue of 65536; pairs in a batch from one chunk."""
    n = 1_281_167
    classes, statistics = np.arange(n) // 1282, {}
    for kind in ("random", "quasi_random"):
        order = ordered(kind, 0, 0, n)  # type: ignore[arg-type]
        batches = [order[i : i + 256] for i in range(0, n - 256, 256 * 25)]
        statistics[kind] = (
            np.mean([len(np.unique(classes[batch])) for batch in batches]),
            len(np.unique(classes[order[:65536]])),
            np.mean([256 - len(np.unique(batch // CHUNK)) for batch in batches]),
        )
    assert statistics["random"] == pytest.approx((226, 1000, 0.4), rel=0.5)
    assert statistics["quasi_random"][0] > 0.93 * statistics["random"][0]
    assert statistics["quasi_random"][1] > 0.97 * statistics["random"][1]
    assert statistics["quasi_random"][2] < 17
