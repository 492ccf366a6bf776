"""Sample order and sharding: pure functions of (seed, epoch, n), the same on every rank, machine and NumPy version.

The id at any position of an epoch is computed alone: no table of n ids exists. Global batch `s` of an epoch has
positions s * G to (s + 1) * G, G the global batch size; a rank takes its slice of them.
"""

import math
from functools import lru_cache
from typing import Literal

import numpy as np

from pipeline.system.counter_rng import GOLDEN, keyed, mix, stream

# Separate these random numbers from those of the augmentation, and from each other.
_ORDER = 0x6F72646572
_SHUFFLE = 0x73687566
_CHUNKS = 0x6368756E6B

Order = Literal["random", "quasi_random"]
CHUNK, WINDOW = 16, 2048
"""Samples in a chunk (1.7 MB of ImageNet), and chunks in a window (3.5 GB), of the order `quasi_random`."""


VERSION = 2
"""Of the order of new runs. Version 1, of earlier ones, has a table of any size: runs resume with their own."""
_TABLE_IDS = 1 << 16  # at most, in a permutation that is made as a table: exactly uniform
_ROUNDS = 8


def ids(kind: Order, seed: int, epoch: int, n: int, positions: np.ndarray, version: int = VERSION) -> np.ndarray:
    """Return the ids at `positions` of an epoch's order, a permutation of 0..n-1: int64, like `positions`.

    A pure function of its arguments. `random` is one permutation of all ids. `quasi_random`, for sets larger than
    memory, cuts the file into chunks of `CHUNK` neighbors; it permutes the chunks, then the samples within each window
    of `WINDOW` chunks: at any time one window is read, each chunk of it in one piece. A window of all chunks gives a
    full shuffle.
    """
    largest = n if version == 1 else _TABLE_IDS
    if kind == "random":
        return _permuted(int(keyed(_ORDER ^ seed, epoch)), n, positions, largest)
    key, chunks, span = int(keyed(_CHUNKS ^ seed, epoch)), -(-n // CHUNK), CHUNK * WINDOW
    places = np.empty_like(positions)
    for first in np.unique(positions // span) * span:  # mostly one window
        inside = (first <= positions) & (positions < first + span)
        window_key = (int(mix(key)) + int(first) * int(GOLDEN)) % 2**64  # its keys are a part of the epoch's stream
        shuffled = _permuted(window_key, min(span, n - int(first)), positions[inside] - first, max(largest, span))
        places[inside] = first + shuffled
    if missing := chunks * CHUNK - n:  # of the file's last chunk: those after it in the order come earlier
        last = _position(key, chunks, chunks - 1, largest)
        places += missing * (places >= (last + 1) * CHUNK - missing)
    return _permuted(key, chunks, places // CHUNK, largest) * CHUNK + places % CHUNK


def _permuted(key: int, n: int, positions: np.ndarray, largest: int) -> np.ndarray:
    """Return the values at `positions` of a permutation of 0..n-1, one for each key; up to `largest`, by a table."""
    if n <= largest:
        return _table(key, n)[positions].astype(np.int64)
    return _feistel(key, n, positions)


@lru_cache(maxsize=4)
def _position(key: int, n: int, value: int, largest: int) -> int:
    """Return the position of `value` in that permutation."""
    if n <= largest:
        return int(np.flatnonzero(_table(key, n) == value)[0])
    return int(_feistel(key, n, np.array([value]), inverse=True)[0])


@lru_cache(maxsize=4)  # chunks and window of this epoch and, near its end, of the next
def _table(key: int, n: int) -> np.ndarray:
    """Return 0..n-1, sorted by 64-bit keys from a counter-based generator; equal keys keep the smaller number first."""
    table = np.argsort(stream(key, n), kind="stable")
    return table.astype(np.uint32) if n <= 1 << 32 else table


def _feistel(key: int, n: int, values: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    """Return a permutation of 0..n-1, or its inverse, at `values`: int64 [m].

    A Feistel network on the cells of a grid of n or slightly more (Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002): rounds rotate each row, or each column, by a number drawn for it. Cells beyond n are sent on
    until they lead to one below n (cycle walking).
    """
    rows = math.isqrt(n - 1) + 1
    sizes, keys = np.array([rows, -(-n // rows)], np.uint64), stream(key, _ROUNDS)
    cells = _rounds(values.astype(np.uint64), sizes, keys, inverse)
    while (outside := np.flatnonzero(cells >= n)).size:
        cells[outside] = _rounds(cells[outside], sizes, keys, inverse)
    return cells.astype(np.int64)


def _rounds(cells: np.ndarray, sizes: np.ndarray, keys: np.ndarray, inverse: bool) -> np.ndarray:
    """Return where the network sends cells of a grid of `sizes`, uint64."""
    place = list(np.divmod(cells, sizes[1]))  # row and column
    for number in range(_ROUNDS)[:: -1 if inverse else 1]:
        turned = number % 2
        shift = mix(keys[number] + place[1 - turned] * GOLDEN) % sizes[turned]  # of `stream(keys[number], ...)`
        place[turned] = (place[turned] + (sizes[turned] - shift if inverse else shift)) % sizes[turned]
    return place[0] * sizes[1] + place[1]


def evenly(n: int, limit: int) -> np.ndarray:
    """Return at most `limit` of 0..n-1, evenly spread, ascending; 0 for all: int64 [m]."""
    count = min(limit or n, n)
    return np.arange(count) * n // max(count, 1)


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Return the number of full global batches in an epoch; the remainder is left out."""
    return n // global_batch


def rank_positions(step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
    """Return the positions in an epoch that `rank` of `world` loads for global batch `step`: int64 [batch / world].

    Raises ValueError where `world` does not divide the global batch.
    """
    if global_batch % world:
        raise ValueError(
            f"a global batch of {global_batch} does not divide among {world} ranks: choose a multiple of it"
        )
    local = global_batch // world
    return step * global_batch + rank * local + np.arange(local)


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
