"""Losses that leap out of the run of the last ones."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

WINDOW = 200
"""Steps that a loss is compared with ..."""
FEWEST = 100
"""... and as many that there have to be."""
THRESHOLD = 6.0
"""Robust standard deviations over the median that are a spike, if they are also ..."""
LEAP = 2.0
"""... so many times the highest of the last losses, over the median."""
CALM = 50
"""Steps without one after which the next is told again."""
_SIGMA = 1.4826  # standard deviations in a median absolute deviation, of normal noise
_FLOOR = 1e-6  # of the median: losses that hardly differ


class SpikeWatch:
    """Compares each step's loss with the median of the last ones, in units of their median absolute deviation."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._calm = CALM  # steps since the last spike, as far as they are counted
        self._row = 0  # spikes in a row

    def add(self, losses: Iterable[float]) -> str | None:
        """Add the losses of the next steps, NaN for one that was skipped; return a sentence where one is a spike."""
        found = None
        for loss in filter(math.isfinite, losses):
            said = self._spike(loss)
            if said and self._calm >= CALM:
                found = found or said
            self._calm, self._row = (0, self._row + 1) if said else (min(self._calm + 1, CALM), 0)
            if self._row == CALM:
                self._window.clear()  # what has lasted so long is the usual now
            if not said:
                self._window.append(loss)
        return found

    def _spike(self, loss: float) -> str:
        """Return a sentence where a loss is a spike."""
        if len(self._window) < FEWEST:
            return ""
        last = np.fromiter(self._window, float)
        median = float(np.median(last))
        sigma = max(_SIGMA * float(np.median(np.abs(last - median))), _FLOOR * abs(median))
        if loss - median <= max(THRESHOLD * sigma, LEAP * (last.max() - median)):
            return ""
        return (
            f"the loss leapt to {loss:.4g} from {median:.4g}, {(loss - median) / sigma:.0f} times its usual deviation: "
            "where this goes on, resume from an earlier checkpoint with a lower optim.lr, or optim.clip 1"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses, plain values."""
        return {"window": list(self._window), "calm": self._calm, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._window = deque(map(float, state["window"]), maxlen=WINDOW)
        self._calm, self._row = int(state["calm"]), int(state["row"])
