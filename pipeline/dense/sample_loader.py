"""Samples that worker threads read and crop one by one, some ahead: global batches in an order of the seed alone.

For data that no beton holds, because something belongs to each image: masks, boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from pipeline.sampling.order import epoch_order, rank_slice, steps_per_epoch
from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError, LoaderStalled
from pipeline.system.thread_pool import Workers

S = TypeVar("S")
_STALLED = 60.0  # seconds
_order_of = lru_cache(maxsize=4)(epoch_order)


class Samples(Generic[S]):
    """Every one of `count` samples once an epoch; what is over from whole global batches is left out of it.

    read: epoch and id to a sample, called in `workers` threads (0 for one a core). batch: of all `world` processes.
    path: of the data, for messages. Raises InputError where there are fewer samples than a batch.
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
        ahead: int = 3,
    ) -> None:
        if not 0 < batch <= count:
            raise InputError(f"{path}: a batch of {batch} from {count} images: choose --batch 1 to {count}")
        self._path, self._count, self._read = path, count, read
        self._batch, self._seed, self._rank, self._world = batch, seed, rank, world
        self._ahead = ahead * batch // world
        self._workers = Workers(workers or available_cores(), lambda: None)
        self.steps = steps_per_epoch(count, batch)

    def ids(self, step: int) -> np.ndarray:
        """Return the samples of this process at a step, counted over all epochs: int64 [B]."""
        epoch, step = divmod(step, self.steps)
        return rank_slice(_order_of(self._seed, epoch, self._count), step, self._batch, self._rank, self._world)

    def batches(self, first: int, last: int) -> Iterator[list[S]]:
        """Yield this process's samples at each of the steps from `first` to before `last`."""
        wanted = ((step // self.steps, index) for step in range(first, last) for index in self.ids(step).tolist())
        found = self._workers.in_order(lambda _, one: self._read(*one), wanted, self._ahead, _STALLED)
        for step in range(first, last):
            try:
                yield list(islice(found, self._batch // self._world))
            except futures.TimeoutError:
                raise LoaderStalled(
                    f"{self._path}: no image for {_STALLED:g} s (step {step}): check the disk or network it is on"
                ) from None

    def close(self) -> None:
        """End the threads."""
        self._workers.close()
