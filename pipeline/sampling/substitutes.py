"""Substitutes for records that cannot be read: the same on every backend, rank and resumed run."""

from typing import Literal

import numpy as np

from pipeline.beton import Beton
from pipeline.system.errors import DamagedRecord, InputError

OnBad = Literal["error", "skip"]


class Substitutes:
    """The bad records found so far; each is replaced by the next intact record, by id.

    The substitute depends on the data alone, not on the order in which bad records are found. on_bad: `error` raises
    the first; `skip` accepts up to one bad record in a hundred (or ten).
    """

    def __init__(self, beton: Beton, on_bad: OnBad) -> None:
        self._beton, self._on_bad = beton, on_bad
        self.bad = set(beton.unreadable)
        self._max_bad = max(10, len(beton) // 100)
        self._check()

    def add(self, error: DamagedRecord) -> None:
        """Add damaged records. Raises `error` if these are not skipped, and InputError for too many."""
        if self._on_bad == "error" or set(error.samples) <= self.bad:  # a known one was read: a defect elsewhere
            raise error
        self.bad |= set(error.samples)
        self._check()

    def _check(self) -> None:
        if len(self.bad) > self._max_bad:
            raise InputError(
                f"{self._beton.path}: {len(self.bad)} damaged records, the first of them {min(self.bad)}, and at most "
                f"{self._max_bad} are skipped: write the file again with python -m pipeline.prepare"
            )

    def resolve(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids of the records to read for samples `ids`, int64 [n], with substitutes for bad ones."""
        if not self.bad:
            return ids
        records = ids.copy()
        for position in np.flatnonzero(np.isin(ids, list(self.bad))):
            while int(records[position]) in self.bad:
                records[position] = (records[position] + 1) % len(self._beton)
        return records
