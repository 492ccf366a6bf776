"""A counter-based random generator: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over arrays of 64-bit keys.

Every random number is `mix(key + counter * GOLDEN)`: there is no state, and each number can be computed alone.
Plain 64-bit integer arithmetic gives the same on every platform and NumPy version.
"""

from typing import Any

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(z: Any) -> np.ndarray:
    """Return SplitMix64's finalizer of `z`, uint64 of any shape: a bijection that mixes all bits."""
    z = np.asarray(z, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = (z + GOLDEN) & np.uint64(0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keyed(first: Any, *rest: Any) -> np.ndarray:
    """Return one key for several numbers, uint64 of their common shape: each is mixed into those before it."""
    key = mix(first)
    for number in rest:
        key = mix(key ^ np.asarray(number, dtype=np.uint64))
    return key


def stream(key: Any, count: int) -> np.ndarray:
    """Return the first `count` 64-bit numbers of each key's stream: uint64 [..., count] for keys of shape [...]."""
    key = np.asarray(key, dtype=np.uint64)[..., None]
    with np.errstate(over="ignore"):
        return mix(key + np.arange(count, dtype=np.uint64) * GOLDEN)


def uniforms(key: Any, count: int) -> np.ndarray:
    """Return `count` numbers from U[0, 1) of each key's stream: float64 [..., count], 53 random bits each."""
    return (stream(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
