"""Differences between runs that share their seeds, with intervals by Student's t."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_QUANTILES = (
    (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    + (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
)  # fmt: skip
"""0.975 quantiles of Student's t with 1 to 20 degrees of freedom. More take the last, which is wider than theirs."""


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, and its 95 % interval, if there are two pairs or more."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def in_points(self) -> str:
        """Return a difference of shares in percentage points, with its interval."""
        interval = (
            "" if self.low is None or self.high is None else f" ({100 * self.low:+.2f} to {100 * self.high:+.2f})"
        )
        return f"{100 * self.mean:+.2f}{interval}"


def paired_difference(values: Sequence[float], base: Sequence[float]) -> Difference | None:
    """Return the mean of values - base, both [n] in the order of their seeds; None for n = 0."""
    differences = np.subtract(values, base)
    n = len(differences)
    if not n:
        return None
    mean = float(differences.mean())
    if n == 1:
        return Difference(mean, None, None, n)
    half = _QUANTILES[min(n - 1, len(_QUANTILES)) - 1] * float(differences.std(ddof=1)) / n**0.5
    return Difference(mean, mean - half, mean + half, n)
