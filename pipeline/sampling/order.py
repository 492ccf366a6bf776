"""Sample order and sharding: pure functions of (seed, epoch, n), the same on every rank, machine and NumPy version.

Global batch `s` of an epoch is `order[s * G : (s + 1) * G]`, G the global batch size; a rank takes its slice of it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipeline.system.counter_rng import keyed, mix, stream

# These keep the random numbers apart from those of the augmentation, and from each other.
_ORDER = 0x6F72646572
_SHUFFLE = 0x73687566
_CHUNKS = 0x6368756E6B

Order = Literal["random", "quasi_random"]
CHUNK, WINDOW = 16, 2048
"""Of `chunked_order`: neighbors in the file that stay together, some 1.7 MB of ImageNet, and how many such chunks are
read at a time, some 3.5 GB."""


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 [n], a pure function of its arguments.

    The ids are sorted by 64-bit keys from a counter-based generator; equal keys keep the smaller id first.
    """
    key = keyed(_ORDER ^ seed, epoch)
    return np.argsort(stream(key, n), kind="stable")


def chunked_order(seed: int, epoch: int, n: int, chunk: int = CHUNK, window: int = WINDOW) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 [n], that reads a file a few chunks of neighbors at a time.

    For sets larger than memory: the file is cut into chunks of `chunk` neighbors, the chunks are permuted, and the
    samples of each `window` of them in turn are permuted. With a window that holds all chunks it is a full shuffle. A
    pure function of its arguments.
    """
    key = keyed(_CHUNKS ^ seed, epoch)
    chunks = np.argsort(stream(key, -(-n // chunk)), kind="stable")
    order = (chunks[:, None] * chunk + np.arange(chunk)).reshape(-1)
    order = order[order < n]
    at = np.arange(n) // (chunk * window)  # the last chunk of the file is shorter: windows are of samples
    return order[np.lexsort((stream(mix(key), n), at))]


def ordered(kind: Order, seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the permutation of an epoch, of `epoch_order` or `chunked_order`."""
    return epoch_order(seed, epoch, n) if kind == "random" else chunked_order(seed, epoch, n)


def evenly(n: int, limit: int) -> np.ndarray:
    """Return at most `limit` of 0..n-1, evenly spread, ascending, or all of them for 0: int64 [m]."""
    count = min(limit or n, n)
    return np.arange(count) * n // max(count, 1)


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Return the number of whole global batches in an epoch; the remainder is left out of that epoch."""
    return n // global_batch


def rank_slice(order: np.ndarray, step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
    """Return the ids that `rank` of `world` loads for global batch `step`: int64 [global_batch / world].

    Raises ValueError where the world does not divide the global batch.
    """
    if global_batch % world:
        raise ValueError(
            f"a global batch of {global_batch} does not divide among {world} ranks: choose a multiple of it"
        )
    local = global_batch // world
    start = step * global_batch + rank * local
    return order[start : start + local]


def shuffled_rows(seed: int, number: int, global_batch: int, parts: int = 1) -> np.ndarray:
    """Return a permutation of the rows of a global batch, int64 [global_batch], within each of `parts` equal parts.

    A pure function of its arguments; `number` is that of the batch, counted over the whole run. Raises ValueError where
    the parts do not divide the batch.
    """
    if global_batch % parts:
        raise ValueError(f"{parts} parts do not divide a global batch of {global_batch}")
    key = keyed(_SHUFFLE ^ seed, number)
    keys = stream(key, global_batch).reshape(parts, -1)
    starts = np.arange(0, global_batch, global_batch // parts)[:, None]
    return (np.argsort(keys, axis=1, kind="stable") + starts).reshape(-1)
