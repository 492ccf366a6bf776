"""The plan of one batch: its records, and the crops of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.augment.draws import ViewDraws


@dataclass(frozen=True)
class Plan:
    """Records, boxes and flips of one batch: all that a backend needs to make its crops."""

    ids: np.ndarray
    """int64 [B]."""
    boxes: np.ndarray
    """int32 [V, B, 4]: top, left, height, width, inside the stored image."""
    flips: np.ndarray
    """bool [V, B]."""
    sizes: tuple[int, ...]
    """Side of each view's crops, pixels."""

    @staticmethod
    def from_draws(ids: np.ndarray, draws: Sequence[ViewDraws], sizes: tuple[int, ...]) -> "Plan":
        """Return the plan of records `ids` (int64 [B]) with the draws of each view."""
        return Plan(ids, np.stack([d.boxes for d in draws]), np.stack([d.flips for d in draws]), sizes)
