"""Long arrays in slices, so that temporaries stay small."""

from collections.abc import Iterator

CHUNK = 1 << 16
"""Samples of a slice: temporaries of a few bytes each then fit into a core's cache."""


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Yield slices of at most `size` that together are 0..count, in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
