"""An epoch's order as a whole, for expectations of tests."""

from __future__ import annotations

import numpy as np

from pipeline.sampling.order import ids


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the ids of an epoch in their order, int64 [n]."""
    return ids("random", seed, epoch, n, np.arange(n))
