"""The key queue against a plain list."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from methods.queue import KeyQueue


@pytest.mark.parametrize("size", [1, 5, 8, 13, 64])
@pytest.mark.parametrize("batch", [1, 4, 5, 8, 20])
def test_rows_are_the_newest_keys_for_any_size_and_batch(size: int, batch: int) -> None:
    queue = KeyQueue(size, 3)
    newest: deque[tuple[float, ...]] = deque((tuple(row.tolist()) for row in queue.keys), maxlen=size)
    for _ in range(7):
        keys = torch.randn(batch, 3)
        queue.write(keys)
        newest.extend(tuple(row.tolist()) for row in keys)
        assert sorted(tuple(row.tolist()) for row in queue.keys) == sorted(newest)


def test_oldest_rows_are_overwritten_in_place() -> None:
    queue = KeyQueue(5, 2)
    storage = queue.keys.data_ptr()
    first, second = torch.full((3, 2), 1.0), torch.full((3, 2), 2.0)
    queue.write(first)
    queue.write(second)
    assert queue.keys[:, 0].tolist() == [2.0, 1.0, 1.0, 2.0, 2.0]
    assert (queue.position.item(), queue.keys.data_ptr()) == (1, storage)


def test_initial_keys_depend_on_the_seed_alone() -> None:
    a, b, c = KeyQueue(50, 8, seed=1), KeyQueue(50, 8, seed=1), KeyQueue(50, 8, seed=2)
    assert torch.equal(a.keys, b.keys)
    assert not torch.equal(a.keys, c.keys)
    assert torch.allclose(a.keys.norm(dim=1), torch.ones(50), atol=1e-6)


@pytest.mark.parametrize("batch", [3, 8, 13])
def test_false_condition_writes_nothing(batch: int) -> None:
    queue, other = KeyQueue(8, 2), KeyQueue(8, 2)
    for step in range(5):
        keys = torch.randn(batch, 2)
        queue.write(torch.full((batch, 2), torch.nan), torch.tensor(False))
        queue.write(keys, torch.tensor(True))
        other.write(keys)
        assert torch.equal(queue.keys, other.keys)
        assert queue.position.item() == other.position.item() == (step + 1) * batch % 8


def test_state_includes_the_write_position() -> None:
    queue, other = KeyQueue(8, 2), KeyQueue(8, 2)
    queue.write(torch.randn(3, 2))
    other.load_state_dict(queue.state_dict())
    assert other.position.item() == 3


def test_bfloat16_error_stays_within_the_documented_bound() -> None:
    torch.manual_seed(0)
    full, half = KeyQueue(4096, 128), KeyQueue(4096, 128, dtype=torch.bfloat16)
    keys = torch.nn.functional.normalize(torch.randn(3000, 128), dim=1)
    for queue in (full, half):
        queue.write(keys)
    q = torch.nn.functional.normalize(full.keys[:64] + 0.03 * torch.randn(64, 128), dim=1)
    error = (q @ full.keys.T - q @ half.keys.float().T).abs()
    assert half.keys.element_size() == 2
    assert 0 < error.max() <= 2**-9
    assert error.mean() < 2e-4
