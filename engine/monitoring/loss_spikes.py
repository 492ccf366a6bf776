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
THRESHOLD = 7.0
"""Robust standard deviations over the trend that are a spike, if they are also ..."""
LEAP = 2.0
"""... so many times the highest of the last losses, over the trend."""
CALM = 50
"""Steps without one after which the next is told again."""
_SIGMA = 1.4826  # standard deviations in a median absolute deviation, of normal noise
_FLOOR = 1e-6  # of the median: losses that hardly differ


def _median(values: np.ndarray) -> float:
    """Return the median of values [N]; `numpy.median`, which checks more, takes ten times as long for a few hundred."""
    ordered = np.sort(values)
    return float(ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _trend(last: np.ndarray) -> np.ndarray:
    """Return the line through the medians of both halves of the last losses [N], and where it goes next: [N + 1]."""
    half = len(last) // 2
    first, second = _median(last[:half]), _median(last[-half:])
    middle = (half - 1) / 2
    at = np.arange(len(last) + 1)
    return first + (second - first) * (at - middle) / (len(last) - half)


class SpikeWatch:
    """Compares each step's loss with the trend of the last ones, in units of their median absolute deviation from it.

    Limits: where noise is skewed or has heavy tails, what it does by itself hides a spike of ten standard deviations in
    one case of five or more (`LEAP`), and noise with heavy tails may be taken for one.
    """

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
        trend = _trend(last)
        usual, deviations = float(trend[-1]), last - trend[:-1]
        sigma = max(_SIGMA * _median(np.abs(deviations)), _FLOOR * abs(usual))
        if loss - usual <= max(THRESHOLD * sigma, LEAP * deviations.max()):
            return ""
        return (
            f"the loss leapt to {loss:.4g} from {usual:.4g}, {(loss - usual) / sigma:.0f} times its usual deviation: "
            "where this goes on, resume from an earlier checkpoint with a lower optim.lr, or optim.clip_grad_norm 1"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses, plain values."""
        return {"window": list(self._window), "calm": self._calm, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._window = deque(map(float, state["window"]), maxlen=WINDOW)
        self._calm, self._row = int(state["calm"]), int(state["row"])
