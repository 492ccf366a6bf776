"""Loss spikes: losses far above the trend of the last ones."""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

WINDOW = 200
"""Number of last losses that a new one is compared with."""
FEWEST = 100
"""Fewest losses to compare with."""
THRESHOLD = 7.0
"""A spike is this many robust standard deviations above the trend, and also ..."""
LEAP = 2.0
"""... this many times as far above it as the highest of the last losses."""
CALM = 50
"""Steps without a spike after which the next one is flagged again."""
_SIGMA = 1.4826  # standard deviations in a median absolute deviation, of normal noise
_FLOOR = 1e-6  # least deviation, as a share of the trend: losses that hardly differ


def _median(values: np.ndarray) -> float:
    """Return the median of values [N], for a few hundred ten times as fast as `numpy.median`, which checks more."""
    ordered = np.sort(values)
    return float(ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _trend(last: np.ndarray) -> np.ndarray:
    """Return the line through the medians of both halves of the last losses [N], with its next value: [N + 1]."""
    half = len(last) // 2
    first, second = _median(last[:half]), _median(last[-half:])
    middle = (half - 1) / 2
    positions = np.arange(len(last) + 1)
    return first + (second - first) * (positions - middle) / (len(last) - half)


class SpikeWatch:
    """Compares each step's loss with the trend of the last ones, in units of their median absolute deviation from it.

    Flags spikes of ten standard deviations always under symmetric noise, about 80 % under skewed noise (`LEAP`); heavy
    tails may be flagged too.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._calm = CALM  # steps since the last spike, counted up to CALM
        self._row = 0  # consecutive spikes

    def add(self, losses: Iterable[float]) -> str | None:
        """Add the losses of the next steps, NaN for a skipped one; return a warning of the first spike, if any."""
        warning = None
        for loss in filter(math.isfinite, losses):
            spike = self._describe_spike(loss)
            if spike and self._calm >= CALM:
                warning = warning or spike
            self._calm, self._row = (0, self._row + 1) if spike else (min(self._calm + 1, CALM), 0)
            if self._row == CALM:
                self._window.clear()  # after CALM spikes in a row the level is a new one
            if not spike:
                self._window.append(loss)
        return warning

    def _describe_spike(self, loss: float) -> str:
        """Return a warning where a loss is a spike, else an empty string."""
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
            "where this continues, resume from an earlier checkpoint with a lower optim.lr, or optim.clip_grad_norm 1"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses and counts as plain values."""
        return {"window": list(self._window), "calm": self._calm, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load `state`."""
        self._window = deque(map(float, state["window"]), maxlen=WINDOW)
        self._calm, self._row = int(state["calm"]), int(state["row"])
