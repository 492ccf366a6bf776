"""What takes the place of records that cannot be read: the same on every backend, rank and resumed run."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipeline.beton import Beton
from pipeline.system.errors import DamagedRecord, InputError

OnBad = Literal["error", "skip"]


class Substitutes:
    """The bad records met so far, and the sample that stands in for each: the next whole one after it, by id.

    Which sample that is depends on the data alone, however and in whatever order bad records are met. `error` raises
    what it is given. `skip` goes on, up to one record in a hundred (or ten).
    """

    def __init__(self, beton: Beton, on_bad: OnBad) -> None:
        self._beton, self._on_bad = beton, on_bad
        self.bad = set(beton.unreadable)
        self._most = max(10, len(beton) // 100)
        self._check()

    def add(self, error: DamagedRecord) -> None:
        """Take note of damaged records. Raises the error, where the policy is `error`, and InputError for too many."""
        if self._on_bad == "error" or set(error.samples) <= self.bad:  # known, and asked for all the same
            raise error
        self.bad |= set(error.samples)
        self._check()

    def _check(self) -> None:
        if len(self.bad) > self._most:
            raise InputError(
                f"{self._beton.path}: {len(self.bad)} damaged records, the first of them {min(self.bad)}, and at most "
                f"{self._most} are skipped: write the file again with python -m pipeline.prepare"
            )

    def resolve(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids of the records to read for samples `ids`, int64 [n]: their own, or their substitutes'."""
        if not self.bad:
            return ids
        found = ids.copy()
        for place in np.flatnonzero(np.isin(ids, list(self.bad))):
            while int(found[place]) in self.bad:
                found[place] = (found[place] + 1) % len(self._beton)
        return found
