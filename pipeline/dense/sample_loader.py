"""A loader of samples that worker threads read one by one, for images with masks or boxes, which no beton contains.

Global batches come in an order that depends on the seed alone.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from pipeline.sampling import order
from pipeline.sampling.order import rank_positions, steps_per_epoch
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, LoaderStalled
from pipeline.system.thread_pool import Workers

S = TypeVar("S")
_STALL_SECONDS = 60.0
_BATCHES_AHEAD = 3


class Samples(Generic[S]):
    """Each of `count` samples once an epoch, except those beyond the last full global batch.

    path: of the data, for messages. read: (epoch, id) to a sample, called in `workers` threads (0: one for each core).
    batch: over all `world` ranks. Raises InputError where there are fewer samples than in a batch.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        read: Callable[[int, int], S],
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if not 0 < batch <= count:
            raise InputError(f"{path}: a batch of {batch} from {count} images: choose --batch 1 to {count}")
        self._path, self._count, self._read = path, count, read
        self._batch, self._seed, self._rank, self._world = batch, seed, rank, world
        self._samples_ahead = _BATCHES_AHEAD * batch // world
        self._workers = Workers(workers or available_cores(), lambda: None)
        self.steps = steps_per_epoch(count, batch)

    def ids(self, step: int) -> np.ndarray:
        """Return the ids of this rank's samples at a step, counted over all epochs: int64 [B]."""
        epoch, step = divmod(step, self.steps)
        positions = rank_positions(step, self._batch, self._rank, self._world)
        return order.ids("random", self._seed, epoch, self._count, positions)

    def batches(self, first: int, last: int) -> Iterator[list[S]]:
        """Yield this rank's samples at each step from `first` to before `last`. Raises LoaderStalled."""
        calls = ((step // self.steps, index) for step in range(first, last) for index in self.ids(step).tolist())
        samples = self._workers.in_order(lambda _, call: self._read(*call), calls, self._samples_ahead, _STALL_SECONDS)
        for step in range(first, last):
            try:
                yield list(islice(samples, self._batch // self._world))
            except futures.TimeoutError:
                raise LoaderStalled(
                    f"{self._path}: no image for {_STALL_SECONDS:g} s (step {step}): check the disk or network it is on"
                ) from None

    def close(self) -> None:
        """End the threads."""
        self._workers.close()
