"""Crops of one batch after another from a backend, several under way; damaged records are passed over where asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

import torch

from pipeline import backends
from pipeline.augment.plan import Plan
from pipeline.backends.base import Backend, Wanted
from pipeline.beton import Beton
from pipeline.sampling.substitutes import OnBad, Substitutes
from pipeline.system.errors import DamagedRecord

Note = TypeVar("Note")


class Supply(Generic[Note]):
    """A backend and the batches under way in it, each with a note of whoever asked for it."""

    def __init__(self, backend: str, beton: Beton, on_bad: OnBad, wanted: Wanted) -> None:
        self._name, self._beton, self._wanted = backend, beton, wanted
        self._notes: deque[Note] = deque()
        self.substitutes = Substitutes(beton, on_bad)
        self.backend = self._build()

    def __len__(self) -> int:
        """Return the number of batches under way."""
        return len(self._notes)

    @property
    def depth(self) -> int:
        """Batches that may be under way."""
        return self.backend.depth

    def submit(self, plan: Plan, note: Note) -> None:
        """Begin a batch."""
        self.backend.submit(plan)
        self._notes.append(note)

    def receive(self, timeout: float, refill: Callable[[], None]) -> tuple[tuple[torch.Tensor, ...], Note]:
        """Return the oldest batch's crops, as `Backend.receive`, and its note; what raises leaves it the oldest.

        refill: submits what is to be under way; called again where a damaged record is found and passed over, with
        which all batches under way are forgotten.
        """
        while True:
            refill()
            try:
                crops = self.backend.receive(timeout)
            except DamagedRecord as error:
                self.substitutes.add(error)
                self.forget()
            else:
                return crops, self._notes.popleft()

    def forget(self) -> None:
        """Forget the batches under way."""
        self._notes.clear()
        if not self.backend.forget():
            self.backend.close()
            self.backend = self._build()

    def close(self) -> None:
        """End the workers and forget the batches under way."""
        self._notes.clear()
        self.backend.close()

    def _build(self) -> Backend:
        """Return the backend; one that reads all records at once may meet damaged ones here."""
        while True:
            try:
                left_out = frozenset(self.substitutes.bad)
                return backends.build(self._name, self._beton, replace(self._wanted, left_out=left_out))
            except DamagedRecord as error:
                self.substitutes.add(error)
