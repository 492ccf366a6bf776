"""The loader: order, draws, backend and augmentation put together, several batches ahead, resumable at any batch.

loader = Loader(Beton("train.beton"), AUGMENTATIONS["moco_v2"], size=224, batch=256, device="cuda")
for epoch in range(200):
    for batch in loader:            # ends with the epoch; the next epoch's first batch is already under way
        step(*batch.views)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.augment.color import IMAGENET, Statistics, augment, normalize
from pipeline.augment.draws import Color, center_boxes, draw_color, draw_views
from pipeline.augment.plan import Plan
from pipeline.backends.base import Wanted
from pipeline.backends.prefetch import Supply
from pipeline.beton import Beton
from pipeline.sampling.order import Order, ordered, rank_slice, shuffled_rows, steps_per_epoch
from pipeline.sampling.substitutes import OnBad
from pipeline.system.device import current, numbered
from pipeline.system.errors import InputError
from pipeline.views import View, view_sizes


@dataclass(frozen=True)
class Shuffle:
    """Views that come in another order of the samples than the others, so that BatchNorm meets other samples there.

    They are exchanged between ranks as uint8 crops; each rank draws the colors of what it receives by itself.
    """

    views: tuple[int, ...]
    """Indices of the views to shuffle."""
    exchange: Callable[[torch.Tensor, np.ndarray], torch.Tensor]
    """(rows [B, ...] of this rank, permutation [G] of all ranks' rows) to this rank's share of the permuted rows."""
    parts: int = 1
    """The permutation stays within so many equal parts of the global batch: 1, or one for each rank."""
    only: tuple[int, ...] = ()
    """Indices of those of the views that are not wanted in the order of `ids`: left out of `Batch.views`."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    views: tuple[torch.Tensor | None, ...]
    """V tensors [B, 3, S, S], normalized, channels-last, on the device."""
    ids: np.ndarray
    """int64 [B]: the records that were read."""
    epoch: int
    step: int
    """Number of the global batch in its epoch."""
    waited: float
    """Seconds the caller waited for the crops."""
    substituted: int = 0
    """Samples whose own record is damaged, and another's was read instead: `ids` names that one."""
    shuffled: dict[int, torch.Tensor] = field(default_factory=dict)
    """Shuffled views [B, 3, S, S] by their index."""
    order: np.ndarray | None = None
    """Permutation [G] that these are in: this rank's row i of them is row order[rank * B + i] of the global batch."""


class _UnderWay(NamedTuple):
    """What is known of a batch before its crops are there; as in `Batch`."""

    epoch: int
    step: int
    ids: np.ndarray
    substituted: int
    colors: list[Color]


class Loader:
    """Augmented views of every sample of `beton` once an epoch, in an order that depends on `seed` and epoch alone.

    `size` is the views' side in pixels, or that of each epoch in turn, the last for all that follow. `batch` is the
    global batch size, of which each of `world` ranks gets its part; the samples that are left when the
    last whole global batch is made are left out of that epoch. Iterating goes on where the last iteration or
    `load_state_dict` left off, to the end of that epoch.
    """

    def __init__(
        self,
        beton: Beton,
        views: tuple[View, ...],
        *,
        size: int | Sequence[int],
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "ffcv",
        workers: int = 0,
        ahead: int = 3,
        stall_timeout: float = 60.0,
        hardware_load: float = 0.9,
        statistics: Statistics = IMAGENET,
        shuffle: Shuffle | None = None,
        on_bad: OnBad = "error",
        order: Order = "random",
    ) -> None:
        if not 0 < batch <= len(beton):
            raise InputError(
                f"{beton.path}: a batch of {batch} from {len(beton)} samples: choose data.batch from 1 to {len(beton)}"
            )
        self.sizes = (size,) if isinstance(size, int) else tuple(size)
        if not views or not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"{len(views)} views of {size} pixels: give one view or more, of 1 pixel or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: ranks are 0 to {world - 1}")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {str(device)!r}: this machine has no GPU that torch can use: give device='cpu'")
        if batch % world:
            raise InputError(
                f"data.batch {batch} does not divide among {world} processes: choose a multiple of {world}"
            )
        self.beton, self.views, self.batch, self.seed = beton, views, batch, seed
        self.rank, self.world, self.device, self.dtype = rank, world, numbered(device), dtype
        self.stall_timeout = stall_timeout
        self.steps = steps_per_epoch(len(beton), batch)
        self._statistics, self._shuffle, self.order = statistics, shuffle, order
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Not where processes exchange views: each would come to it at a time of its own.
        self._stages = self._stream is not None and shuffle is None
        self._staged: Batch | Exception | None = None
        self._orders: dict[int, np.ndarray] = {}  # of this epoch and, near its end, the next
        self._epoch, self._step = 0, 0  # of the next batch to hand out
        wanted = Wanted(self._sizes_of(None), batch // world, workers, ahead, self.device, hardware_load)
        self._supply: Supply[_UnderWay] = Supply(backend, beton, on_bad, wanted)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        while self._epoch == epoch:
            yield self._next()

    def endless(self) -> Iterator[Batch]:
        """Yield the batches from here on, one epoch after another, without an end."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch and what it depends on, plain JSON values."""
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": self.seed,
            "batch": self.batch,
            "order": self.order,
            "samples": len(self.beton),
            "fingerprint": self.beton.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, exactly. Raises InputError where seed, batch or data set are not the state's."""
        own = self.state_dict()
        if state.get("order") == "chunked":  # its former name
            state = state | {"order": "quasi_random"}
        for key in ("seed", "batch", "order", "samples", "fingerprint"):
            if state.get(key) != own[key]:
                raise InputError(
                    f"{self.beton.path}: the loader's {key} is {own[key]!r}, the saved one {state.get(key)!r}: resume "
                    "with the settings and the data the run was started with"
                )
        self._staged = None
        if len(self._supply):
            self._supply.forget()
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def close(self) -> None:
        """End the workers and forget the batches under way."""
        self._supply.close()

    def _next(self) -> Batch:
        """Return the next batch, and begin the views of the one after it, where its crops are there already."""
        batch, self._staged = self._staged or self._made(), None
        if isinstance(batch, Exception):
            raise batch
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._stream)
            for view in (*batch.views, *batch.shuffled.values()):
                if view is not None:
                    view.record_stream(stream)
        self._epoch, self._step = self._after(1)
        if self._stages and self._supply.backend.ready():
            try:
                self._staged = self._made()
            except Exception as error:  # for whoever asks for that batch
                self._staged = error
        return batch

    def _made(self) -> Batch:
        """Return the batch after those handed out. On a GPU its views are made on a stream of their own."""
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            return self._from_crops()

    def _from_crops(self) -> Batch:
        self._refill()
        start = time.perf_counter()
        crops, of = self._supply.receive(self.stall_timeout, self._refill)
        waited = time.perf_counter() - start
        shuffled, order = self._shuffled(crops, of.epoch, of.step)
        left_out = self._shuffle.only if self._shuffle else ()
        views = tuple(
            None if index in left_out else augment(crop, color, self._statistics, self.dtype)
            for index, (crop, color) in enumerate(zip(crops, of.colors, strict=True))
        )
        self._submit(*self._after(len(self._supply) + 1))
        return Batch(views, of.ids, of.epoch, of.step, waited, of.substituted, shuffled, order)

    def _refill(self) -> None:
        """Submit the batches after those under way."""
        while len(self._supply) < self._supply.depth:
            self._submit(*self._after(len(self._supply)))

    def _shuffled(
        self, crops: tuple[torch.Tensor, ...], epoch: int, step: int
    ) -> tuple[dict[int, torch.Tensor], np.ndarray | None]:
        """Return the shuffled views by index, and their permutation of the global batch."""
        if self._shuffle is None:
            return {}, None
        order = shuffled_rows(self.seed, epoch * self.steps + step, self.batch, self._shuffle.parts)
        whole = rank_slice(self._order_of(epoch), step, self.batch, 0, 1)
        ids = whole[rank_slice(order, 0, self.batch, self.rank, self.world)]
        views = {}
        for index in self._shuffle.views:
            color = draw_color(self.views[index], index, seed=self.seed, epoch=epoch, ids=ids)
            exchanged = self._shuffle.exchange(crops[index], order)
            views[index] = augment(exchanged, color, self._statistics, self.dtype)
        return views, order

    def _sizes_of(self, epoch: int | None) -> tuple[int, ...]:
        """Return the views' sides in an epoch; their largest for None."""
        size = max(self.sizes) if epoch is None else self.sizes[min(epoch, len(self.sizes) - 1)]
        return view_sizes(self.views, size)

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = ordered(self.order, self.seed, epoch, len(self.beton))
        return self._orders[epoch]

    def _after(self, batches: int) -> tuple[int, int]:
        """Return epoch and step of the batch that many after the next one to hand out."""
        return divmod(self._epoch * self.steps + self._step + batches, self.steps)

    def _submit(self, epoch: int, step: int) -> None:
        ids = rank_slice(self._order_of(epoch), step, self.batch, self.rank, self.world)
        records = self._supply.substitutes.resolve(ids)  # draws stay those of the sample
        heights, widths = self.beton.heights[records], self.beton.widths[records]
        drawn = draw_views(self.views, seed=self.seed, epoch=epoch, ids=ids, heights=heights, widths=widths)
        note = _UnderWay(epoch, step, records, int((records != ids).sum()), [d.color for d in drawn])
        self._supply.submit(Plan.of(records, drawn, self._sizes_of(epoch)), note)


class CenterLoader:
    """Every sample of `beton` once, in order, center-cropped and normalized: batches (images [B, 3, S, S], ids [B]).

    ids are the records that were read, which for damaged ones that are passed over are others.
    `share` is the crop's side over the image's shorter side: 0.875 is the usual 224 of 256.
    """

    def __init__(
        self,
        beton: Beton,
        *,
        size: int,
        batch: int,
        share: float = 0.875,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "ffcv",
        workers: int = 0,
        ahead: int = 3,
        stall_timeout: float = 60.0,
        hardware_load: float = 0.9,
        statistics: Statistics = IMAGENET,
        indices: np.ndarray | None = None,
        on_bad: OnBad = "error",
    ) -> None:
        self.beton, self.size, self.share, self.dtype = beton, size, share, dtype
        self.stall_timeout = stall_timeout
        self.indices = np.arange(len(beton)) if indices is None else indices
        self.batch = min(batch, max(len(self.indices), 1))
        self._statistics = statistics
        self._device = numbered(device)
        wanted = Wanted((size,), self.batch, workers, ahead, self._device, hardware_load)
        self._supply: Supply[np.ndarray] = Supply(backend, beton, on_bad, wanted)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        if len(self._supply):  # left over from an iteration that was broken off
            self._supply.forget()
        for number in range(len(self)):
            with current(self._device):
                crops, ids = self._supply.receive(self.stall_timeout, partial(self._refill, number))
                images = normalize(crops[0], self._statistics, self.dtype)
            self._refill(number + 1)
            yield images, ids

    def _refill(self, first: int) -> None:
        """Submit the batches after those under way, of which the oldest is number `first`."""
        for number in range(first + len(self._supply), min(first + self._supply.depth, len(self))):
            ids = self.indices[number * self.batch : (number + 1) * self.batch]
            records = self._supply.substitutes.resolve(ids)
            boxes = center_boxes(self.beton.heights[records], self.beton.widths[records], self.share)
            self._supply.submit(Plan(records, boxes[None], np.zeros((1, len(records)), bool), (self.size,)), records)

    def close(self) -> None:
        """End the workers and forget the batches under way."""
        self._supply.close()
