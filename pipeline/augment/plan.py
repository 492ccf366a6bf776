"""The plan of one batch: its records, and the crops of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.augment.draws import ViewDraws
from pipeline.augment.packed import PackedColor


@dataclass(frozen=True)
class Plan:
    """Records, boxes and flips of one batch, and on the CPU its colors: all that a backend needs to make its views."""

    ids: np.ndarray
    """int64 [B]."""
    boxes: np.ndarray
    """int32 [V, B, 4]: top, left, height, width, inside the stored image."""
    flips: np.ndarray
    """uint8 [V, B]: 0, 1 for a horizontal flip, 2 for a vertical one, 3 for both."""
    sizes: tuple[int, ...]
    """Side of each view's crops, pixels."""
    colors: tuple[PackedColor, ...] | None = field(default=None, kw_only=True)
    """The color operations of each view where the backend finishes it, on the CPU; None: it returns crops."""

    @staticmethod
    def from_draws(
        ids: np.ndarray,
        draws: Sequence[ViewDraws],
        sizes: tuple[int, ...],
        colors: tuple[PackedColor, ...] | None = None,
    ) -> "Plan":
        """Return the plan of records `ids` (int64 [B]) with the draws of each view."""
        flips = np.stack([d.flips + np.uint8(2) * d.vflips for d in draws])
        return Plan(ids, np.stack([d.boxes for d in draws]), flips, sizes, colors=colors)
