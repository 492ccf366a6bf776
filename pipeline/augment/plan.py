"""The plan of one batch: which records, which crops of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.augment.draws import ViewDraws


@dataclass(frozen=True)
class Plan:
    """What one batch shall hold."""

    ids: np.ndarray
    """int64 [B]."""
    boxes: np.ndarray
    """int32 [V, B, 4]: top, left, height, width, inside the stored image."""
    flips: np.ndarray
    """bool [V, B]."""
    sizes: tuple[int, ...]
    """Side of each view's crops, pixels."""

    @staticmethod
    def of(ids: np.ndarray, drawn: Sequence[ViewDraws], sizes: tuple[int, ...]) -> Plan:
        """Return the plan of records `ids` (int64 [B]) by the draws of their views."""
        return Plan(ids, np.stack([d.boxes for d in drawn]), np.stack([d.flips for d in drawn]), sizes)
