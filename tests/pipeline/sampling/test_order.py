"""Tests of the sample order and its sharding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.sampling import order as order_module
from pipeline.sampling.order import CHUNK, WINDOW, Order, ids, rank_positions, shuffled_rows, steps_per_epoch
from pipeline.system.counter_rng import keyed, mix, stream
from tests.pipeline.orders import epoch_order


def _sorted_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order `random` of version 1: ids sorted by their keys."""
    return np.argsort(stream(keyed(0x6F72646572 ^ seed, epoch), n), kind="stable")


def _sorted_chunks(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order `quasi_random` of version 1: chunks sorted by their keys, then samples within each window."""
    chunk, window = order_module.CHUNK, order_module.WINDOW
    key = keyed(0x6368756E6B ^ seed, epoch)
    chunks = np.argsort(stream(key, -(-n // chunk)), kind="stable")
    order = (chunks[:, None] * chunk + np.arange(chunk)).reshape(-1)
    order = order[order < n]
    return order[np.lexsort((stream(mix(key), n), np.arange(n) // (chunk * window)))]


def _whole(kind: Order, seed: int, epoch: int, n: int, version: int = 2) -> np.ndarray:
    return ids(kind, seed, epoch, n, np.arange(n), version)


@pytest.fixture(params=["table", "network"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make all permutations as tables, or all by the Feistel network, however small."""
    if request.param == "network":
        monkeypatch.setattr(order_module, "_TABLE_IDS", 0)
    return str(request.param)


# ---- the order ----


@pytest.mark.parametrize("kind", ["random", "quasi_random"])
def test_order_is_a_permutation(kind: Order, way: str) -> None:
    for n in [*range(1, 200), 255, 256, 257, 1000, 4096, 10_007, 70_000]:
        order = _whole(kind, 7, n, n)
        assert order.dtype == np.int64
        assert np.sort(order).tolist() == list(range(n)), n


@pytest.mark.parametrize("kind", ["random", "quasi_random"])
@pytest.mark.parametrize("n", [100_003, 1_281_167, 10**8, 3 * 10**9])
def test_any_position_is_computed_alone(kind: Order, n: int) -> None:
    """And twenty thousand positions have as many ids."""
    places = np.random.default_rng(0).integers(0, n - 10_000, 2)
    positions = np.concatenate([place + np.arange(10_000) for place in np.sort(places)])
    assert positions[10_000] > positions[9_999]
    values = ids(kind, 5, 2, n, positions)
    assert len(np.unique(values)) == len(positions)
    assert 0 <= values.min() <= values.max() < n
    for at in (0, 7, len(positions) - 1):
        assert ids(kind, 5, 2, n, positions[at : at + 1]) == values[at]


@pytest.mark.parametrize("n", [1, 2, 3, 100, 70_000, 10**8])
def test_the_network_has_an_inverse(n: int) -> None:
    values = np.unique(np.random.default_rng(0).integers(0, n, 300))
    there = order_module._feistel(9, n, values)
    assert order_module._feistel(9, n, there, inverse=True).tolist() == values.tolist()


@pytest.mark.parametrize("n", [1, 17, 1000, 40_000, 70_001, 300_000])
def test_the_first_version_sorts_keys(n: int) -> None:
    """Runs that it started resume with it; up to 65,536 ids, or as many chunks, the present order is the same."""
    for kind, reference in (("random", _sorted_order), ("quasi_random", _sorted_chunks)):
        expected = reference(3, 5, n)
        assert np.array_equal(_whole(kind, 3, 5, n, version=1), expected)  # type: ignore[arg-type]
        same = np.array_equal(_whole(kind, 3, 5, n), expected)  # type: ignore[arg-type]
        assert same == (n <= 1 << 16 or kind == "quasi_random")


def test_order_depends_on_its_arguments_alone() -> None:
    first = epoch_order(7, 3, 500)
    np.random.default_rng(0).random(10)
    epoch_order(8, 4, 900)
    assert first.tolist() == epoch_order(7, 3, 500).tolist()


@pytest.mark.parametrize(
    ("seed", "epoch", "n", "first"),
    [
        (7, 3, 1000, [624, 328, 234, 555, 757, 892, 397, 236, 746, 117]),
        (0, 0, 1281167, [394862, 1180957, 862093, 946284, 1075692, 366224]),
        (2**64 - 1, 2**40, 5, [2, 4, 3, 1, 0]),
    ],
)
def test_order_never_changes(seed: int, epoch: int, n: int, first: list[int]) -> None:
    """A change means that no earlier run can be resumed or repeated."""
    assert ids("random", seed, epoch, n, np.arange(len(first))).tolist() == first


def test_earlier_and_quasi_random_orders_never_change() -> None:
    first = ids("random", 0, 0, 1_281_167, np.arange(6), version=1)
    assert first.tolist() == [1162081, 524132, 184224, 985185, 1196811, 212893]
    assert ids("quasi_random", 0, 0, 1_281_167, np.arange(5)).tolist() == [1268149, 557396, 250177, 838635, 337661]
    assert ids("quasi_random", 0, 0, 1_281_167, np.arange(5), version=1).tolist() == [
        1170501,
        633236,
        597921,
        179627,
        834301,
    ]


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
    order_module._table.cache_clear()
    try:
        assert epoch_order(0, 0, 500).tolist() == list(range(500))
    finally:
        order_module._table.cache_clear()  # no later test may receive this table


def test_another_seed_or_epoch_gives_an_unrelated_order(way: str) -> None:
    orders = [epoch_order(seed, epoch, 2000) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 8  # one common position is expected
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(2000)


def test_every_id_is_equally_likely_at_every_position(way: str) -> None:
    """Chi-square of id by position over 1,500 seeds: 81 degrees of freedom, above 139 once in 10,000 times."""
    n, runs = 10, 1500
    counts = np.zeros((n, n))
    for seed in range(runs):
        counts[np.arange(n), epoch_order(seed, 0, n)] += 1
    expected = runs / n
    assert ((counts - expected) ** 2 / expected).sum() < 139
    assert ((counts[0] - expected) ** 2 / expected).sum() < 33.7  # the first position alone: 9 degrees of freedom


def test_first_id_is_near_uniform_over_epochs(way: str) -> None:
    n, runs = 20, 1500
    counts = np.bincount([epoch_order(1, epoch, n)[0] for epoch in range(runs)], minlength=n)
    assert ((counts - runs / n) ** 2 / (runs / n)).sum() < 50.8  # 19 degrees of freedom, once in 10,000 times


# ---- large sets: the present order, by a network, and the first version's ----

_N, _EPOCHS = 70_001, 12


@pytest.fixture(scope="module", params=[1, 2])
def orders(request: pytest.FixtureRequest) -> np.ndarray:
    """Return the orders of several epochs, by each version: int64 [epochs, n]."""
    return np.stack([_whole("random", 1, epoch, _N, request.param) for epoch in range(_EPOCHS)])


def _chi_square(a: np.ndarray, b: np.ndarray, bins: int = 32) -> float:
    """Return how far pairs of numbers below `_N` are from uniform and independent, in standard deviations."""
    counts = np.bincount(a * bins // _N * bins + b * bins // _N, minlength=bins**2)
    shares = np.diff(-(-np.arange(bins + 1) * _N // bins)) / _N
    expected = len(a) * np.outer(shares, shares).reshape(-1)
    freedom = bins**2 - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_ids_are_uniform_over_positions(orders: np.ndarray) -> None:
    assert abs(_chi_square(np.tile(np.arange(_N), _EPOCHS), orders.reshape(-1))) < 4
    ends = np.concatenate([orders[:, :500], orders[:, -500:]], axis=1)
    assert abs(_chi_square(np.tile(np.arange(1000) * _N // 1000, _EPOCHS), ends.reshape(-1), 8)) < 4


@pytest.mark.parametrize("distance", [1, 2, 256, 264, 265])
def test_ids_at_a_distance_are_independent(distance: int, orders: np.ndarray) -> None:
    """Of the next position, and of the next row or column of the network's grid, of 265 rows."""
    a, b = orders[:, :-distance].reshape(-1), orders[:, distance:].reshape(-1)
    assert abs(_chi_square(a, b)) < 4
    assert abs(_chi_square(a, (b - a) % _N)) < 4
    neighbors = int((np.abs(a - b) == distance).sum())  # two in an epoch are expected
    assert abs(neighbors - 2 * _EPOCHS) < 4 * np.sqrt(2 * _EPOCHS)


def test_positions_of_neighbors_in_the_file_are_independent(orders: np.ndarray) -> None:
    places = np.argsort(orders, axis=1)
    for distance in (1, 264, 265):
        assert abs(_chi_square(places[:, :-distance].reshape(-1), places[:, distance:].reshape(-1))) < 4


def test_epochs_and_seeds_are_independent(orders: np.ndarray) -> None:
    others = np.stack([_whole("random", 2, epoch, _N) for epoch in range(_EPOCHS)])
    for a, b in ((orders[:-1], orders[1:]), (orders, others)):
        assert abs(_chi_square(a.reshape(-1), b.reshape(-1))) < 4
        common = int((a == b).sum())  # one in a pair is expected
        assert abs(common - len(a)) < 4 * np.sqrt(len(a))


def test_a_batch_has_as_many_classes_as_a_draw_without_replacement(orders: np.ndarray) -> None:
    """Of a file in class order: mean and spread of the number of classes in batches of 256, of 1,000 classes."""
    batches = orders[:, : _N // 256 * 256].reshape(-1, 256) * 1000 // _N
    classes = np.array([len(np.unique(batch)) for batch in batches])
    size = _N / 1000
    absent = np.exp(np.log1p(-256 / (_N - np.arange(int(size)))).sum())  # hypergeometric, for a class of 70
    both = np.exp(np.log1p(-256 / (_N - np.arange(int(2 * size)))).sum())
    mean, variance = 1000 * (1 - absent), 1000 * absent * (1 - absent) + 999_000 * (both - absent**2)
    assert abs(classes.mean() - mean) < 4 * np.sqrt(variance / len(classes))
    assert classes.var() == pytest.approx(variance, rel=0.1)


# ---- its sharding ----


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_slices_of_all_ranks_are_the_global_batch(world: int) -> None:
    order, batch = epoch_order(7, 3, 103), 12
    for step in range(steps_per_epoch(103, batch)):
        slices = [order[rank_positions(step, batch, rank, world)] for rank in range(world)]
        assert {len(part) for part in slices} == {batch // world}
        assert np.concatenate(slices).tolist() == order[step * batch : (step + 1) * batch].tolist()


@pytest.mark.parametrize(("n", "batch", "steps"), [(103, 12, 8), (96, 12, 8), (12, 12, 1), (11, 12, 0)])
def test_an_epoch_has_only_full_batches(n: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(n, batch) == steps


@pytest.mark.parametrize(("batch", "world"), [(10, 3), (4, 8), (255, 2)])
def test_a_batch_not_divisible_by_the_world_size_is_refused(batch: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"{batch} does not divide among {world} ranks") as caught:
        rank_positions(0, batch, 0, world)
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
    order = _whole("quasi_random", 3, 5, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == _whole("quasi_random", 3, 5, n).tolist() == _sorted_chunks(3, 5, n).tolist()
    if n >= 1000:
        for seed, epoch in ((3, 6), (4, 5)):
            assert order.tolist() != _whole("quasi_random", seed, epoch, n).tolist()


def test_a_window_reads_few_chunks_and_each_chunk_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window, n = 10, 20_000
    monkeypatch.setattr(order_module, "WINDOW", window)
    order = _whole("quasi_random", 0, 0, n)
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
        order = _whole(kind, 0, 0, n)  # type: ignore[arg-type]
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
