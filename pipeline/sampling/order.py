"""Sample order and sharding: pure functions of (seed, epoch, n), the same on every rank, machine and NumPy version.

Global batch `s` of an epoch is `order[s * G : (s + 1) * G]`, G the global batch size; a rank takes its slice of it.
"""

from typing import Literal

import numpy as np

from pipeline.system.counter_rng import keyed, mix, stream

# Separate these random numbers from those of the augmentation, and from each other.
_ORDER = 0x6F72646572
_SHUFFLE = 0x73687566
_CHUNKS = 0x6368756E6B

Order = Literal["random", "quasi_random"]
CHUNK, WINDOW = 16, 2048
"""Samples in a chunk (1.7 MB of ImageNet), and chunks in a window (3.5 GB), of `quasi_random_order`."""


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 [n], a pure function of its arguments.

    The ids are sorted by 64-bit keys from a counter-based generator; equal keys keep the smaller id first.
    """
    key = keyed(_ORDER ^ seed, epoch)
    return np.argsort(stream(key, n), kind="stable")


def quasi_random_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 [n], a pure function of its arguments, for sets larger than memory.

    The file is cut into chunks of `CHUNK` neighbors. The chunks are permuted, then the samples within each window of
    `WINDOW` chunks: at any time one window is read, each chunk of it in one piece. A window of all chunks gives a full
    shuffle.
    """
    key = keyed(_CHUNKS ^ seed, epoch)
    chunks = np.argsort(stream(key, -(-n // CHUNK)), kind="stable")
    order = (chunks[:, None] * CHUNK + np.arange(CHUNK)).reshape(-1)
    order = order[order < n]
    windows = np.arange(n) // (CHUNK * WINDOW)  # counted in samples, as the file's last chunk may be shorter
    return order[np.lexsort((stream(mix(key), n), windows))]


def ordered(kind: Order, seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the permutation of an epoch, by `epoch_order` or `quasi_random_order`."""
    return epoch_order(seed, epoch, n) if kind == "random" else quasi_random_order(seed, epoch, n)


def evenly(n: int, limit: int) -> np.ndarray:
    """Return at most `limit` of 0..n-1, evenly spread, ascending; 0 for all: int64 [m]."""
    count = min(limit or n, n)
    return np.arange(count) * n // max(count, 1)


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Return the number of full global batches in an epoch; the remainder is left out."""
    return n // global_batch


def rank_slice(order: np.ndarray, step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
    """Return the ids of global batch `step` that `rank` of `world` loads: int64 [global_batch / world].

    Raises ValueError where `world` does not divide the global batch.
    """
    if global_batch % world:
        raise ValueError(
            f"a global batch of {global_batch} does not divide among {world} ranks: choose a multiple of it"
        )
    local = global_batch // world
    start = step * global_batch + rank * local
    return order[start : start + local]


def shuffled_rows(seed: int, number: int, global_batch: int, parts: int = 1) -> np.ndarray:
    """Return a permutation of a global batch's rows, int64 [global_batch], within each of `parts` equal parts.

    A pure function of its arguments. number: of the batch, counted over the run. Raises ValueError where `parts` does
    not divide the batch.
    """
    if global_batch % parts:
        raise ValueError(f"{parts} parts do not divide a global batch of {global_batch}")
    key = keyed(_SHUFFLE ^ seed, number)
    keys = stream(key, global_batch).reshape(parts, -1)
    starts = np.arange(0, global_batch, global_batch // parts)[:, None]
    return (np.argsort(keys, axis=1, kind="stable") + starts).reshape(-1)
