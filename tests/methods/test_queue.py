"""The key queue against a plain list."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from methods.queue import KeyQueue


@pytest.mark.parametrize("length", [1, 5, 8, 13, 64])
@pytest.mark.parametrize("batch", [1, 4, 5, 8, 20])
def test_rows_are_the_newest_keys_for_any_length_and_batch(length: int, batch: int) -> None:
    queue = KeyQueue(length, 3)
    newest: deque[tuple[float, ...]] = deque((tuple(row.tolist()) for row in queue.keys), maxlen=length)
    for _ in range(7):
        keys = torch.randn(batch, 3)
        queue.write(keys)
        newest.extend(tuple(row.tolist()) for row in keys)
        assert sorted(tuple(row.tolist()) for row in queue.keys) == sorted(newest)


def test_oldest_are_overwritten_in_place_from_the_write_position() -> None:
    queue = KeyQueue(5, 2)
    storage = queue.keys.data_ptr()
    first, second = torch.full((3, 2), 1.0), torch.full((3, 2), 2.0)
    queue.write(first)
    queue.write(second)
    assert queue.keys[:, 0].tolist() == [2.0, 1.0, 1.0, 2.0, 2.0]
    assert (queue.position, queue.keys.data_ptr()) == (1, storage)


def test_begins_as_directions_that_depend_on_the_seed_alone() -> None:
    a, b, c = KeyQueue(50, 8, seed=1), KeyQueue(50, 8, seed=1), KeyQueue(50, 8, seed=2)
    assert torch.equal(a.keys, b.keys)
    assert not torch.equal(a.keys, c.keys)
    assert torch.allclose(a.keys.norm(dim=1), torch.ones(50), atol=1e-6)
