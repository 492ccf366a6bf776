"""A backend with several batches under way, and substitutes for damaged records where these are skipped."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

import torch

from pipeline import backends
from pipeline.augment.plan import Plan
from pipeline.backends.base import Backend, BackendConfig
from pipeline.beton import Beton
from pipeline.sampling.substitutes import OnBad, Substitutes
from pipeline.system.errors import DamagedRecord

Note = TypeVar("Note")


class PrefetchQueue(Generic[Note]):
    """A backend and its batches under way, each with a note from the caller."""

    def __init__(self, backend: str, beton: Beton, on_bad: OnBad, config: BackendConfig) -> None:
        self._name, self._beton, self._config = backend, beton, config
        self.depth = config.depth
        self._notes: deque[Note] = deque()
        self.substitutes = Substitutes(beton, on_bad)
        self.backend = self._build()

    def __len__(self) -> int:
        """Return the number of batches under way."""
        return len(self._notes)

    def submit(self, plan: Plan, note: Note) -> None:
        """Start a batch."""
        self.backend.submit(plan)
        self._notes.append(note)

    def receive(self, timeout: float, refill: Callable[[], None]) -> tuple[tuple[torch.Tensor, ...], Note]:
        """Return the oldest batch's crops and its note. Raises as `Backend.receive`; the batch then stays the oldest.

        refill: submits batches up to `depth`. Called first, and again after a damaged record that is skipped, which
        drops all batches under way.
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
        """Drop the batches under way."""
        self._notes.clear()
        if not self.backend.forget():
            self.backend.close()
            self.backend = self._build()

    def close(self) -> None:
        """Drop the batches under way and end the workers."""
        self._notes.clear()
        self.backend.close()

    def _build(self) -> Backend:
        """Return a new backend. One that reads all records at once may find damaged ones here."""
        while True:
            try:
                skipped = frozenset(self.substitutes.bad)
                return backends.build(self._name, self._beton, replace(self._config, skipped=skipped))
            except DamagedRecord as error:
                self.substitutes.add(error)
