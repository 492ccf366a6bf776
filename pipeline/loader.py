"""The loaders: order, draws, backend and augmentation together, several batches ahead, resumable at any batch.

loader = Loader(Beton("train.beton"), AUGMENTATIONS["moco_v2"], size=224, batch=256, device="cuda")
for epoch in range(200):
    for batch in loader:            # one epoch; the first batch of the next is under way before it ends
        step(*batch.views)
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from typing_extensions import Unpack

from pipeline.augment.color import IMAGENET, Statistics, augment, normalize, packed
from pipeline.augment.draws import Color, center_boxes, draw_color, draw_views
from pipeline.augment.packed import PackedColor
from pipeline.augment.plan import Plan
from pipeline.backends.base import BackendConfig
from pipeline.backends.prefetch import PrefetchQueue
from pipeline.beton import Beton
from pipeline.sampling import order as sampling
from pipeline.sampling.order import Order, rank_positions, shuffled_rows, steps_per_epoch
from pipeline.sampling.substitutes import OnBad
from pipeline.system.device import current, numbered
from pipeline.system.errors import InputError
from pipeline.views import View, view_sizes

_STEPS_AHEAD = 2
"""Steps that the host may queue on a GPU before the oldest of them ends."""


@dataclass(frozen=True)
class LoaderOptions:
    """The options that both loaders have."""

    size: int | Sequence[int]
    """Side of the views, pixels. `Loader` also takes one for each epoch; the last is that of all later epochs."""
    batch: int
    """Images in a batch; of `Loader`, in a global batch, over all ranks."""
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    """Type of the views."""
    backend: str = "ffcv"
    """One of `pipeline.backends.BACKENDS`."""
    workers: int = 0
    """Threads; 0: one for each core."""
    prefetch_factor: int = 3
    """Batches prepared in advance."""
    stall_timeout: float = 60.0
    """Seconds without a batch after which LoaderStalled is raised."""
    hw_decoder_load: float = 0.9
    """DALI only: share of the JPEGs for the GPU's hardware decoder, where it has one."""
    statistics: Statistics = IMAGENET
    """Channel means and standard deviations for normalization."""
    on_bad: OnBad = "error"
    """A damaged record raises an error, or is skipped: the next intact record is read in its place."""

    def queue(self, beton: Beton, sizes: tuple[int, ...], batch: int) -> PrefetchQueue:
        """Return a queue for batches of `batch` samples and views of at most `sizes` pixels a side."""
        depth, device = self.prefetch_factor, numbered(self.device)
        config = BackendConfig(sizes, batch, self.workers, depth, device, self.hw_decoder_load)
        return PrefetchQueue(self.backend, beton, self.on_bad, config)

    def packed(self, colors: Sequence[Color], sizes: Sequence[int]) -> tuple[PackedColor, ...] | None:
        """Return the views' colors for a backend that finishes views; None on a GPU, which receives crops."""
        if torch.device(self.device).type != "cpu":
            return None
        views = zip(colors, sizes, strict=True)
        return tuple(packed(color, size, self.statistics, self.dtype) for color, size in views)


class OptionalKeywords(TypedDict, total=False):
    """The fields of `LoaderOptions` that have a default, as keyword arguments."""

    device: torch.device | str
    dtype: torch.dtype
    backend: str
    workers: int
    prefetch_factor: int
    stall_timeout: float
    hw_decoder_load: float
    statistics: Statistics
    on_bad: OnBad


@dataclass(frozen=True)
class Shuffle:
    """Views whose samples are permuted over the global batch, so that BatchNorm sees another batch there (MoCo).

    On a GPU ranks exchange them as uint8 crops, and each rank then draws the colors of the samples it received; on the
    CPU, as finished views. Either way they are bytes to `exchange`.
    """

    views: tuple[int, ...]
    """Indices of the views to shuffle."""
    exchange: Callable[[torch.Tensor, np.ndarray], torch.Tensor]
    """(this rank's rows [B, ...], permutation [G] of all ranks' rows) to this rank's share of the permuted rows."""
    parts: int = 1
    """Equal parts of the global batch that the permutation stays within: 1, or one for each rank."""
    only: tuple[int, ...] = ()
    """Indices of the views that are needed shuffled alone: None in `Batch.views`."""


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
    """Samples with a damaged record, for which another was read; `ids` has that other one."""
    shuffled: dict[int, torch.Tensor] = field(default_factory=dict)
    """Shuffled views [B, 3, S, S] by their index."""
    order: np.ndarray | None = None
    """Permutation [G] of the shuffled views: this rank's row i is row order[rank * B + i] of the global batch."""


class _Note(NamedTuple):
    """A batch under way; fields as in `Batch`."""

    epoch: int
    step: int
    ids: np.ndarray
    substituted: int
    colors: list[Color]


class Loader:
    """Augmented views of every sample of `beton` once an epoch, in an order that depends on `seed` and epoch alone.

    Each of `world` ranks receives its slice of every global batch. Samples beyond the last full global batch are left
    out of that epoch. Iterating continues where the last iteration or `load_state_dict` stopped, to the end of that
    epoch. size, batch and options: see `LoaderOptions`.

    Raises InputError for a batch larger than the set or not divisible by `world`, a missing GPU, or data that the
    backend cannot read.
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
        order: Order = "random",
        shuffle: Shuffle | None = None,
        **options: Unpack[OptionalKeywords],
    ) -> None:
        self._options = chosen = LoaderOptions(size, batch, **options)
        self._sizes = (size,) if isinstance(size, int) else tuple(size)
        if not 0 < batch <= len(beton):
            raise InputError(f"{beton.path}: a batch of {batch} from {len(beton)} samples: choose 1 to {len(beton)}")
        if not views or not self._sizes or min(self._sizes) < 1:
            raise ValueError(f"{len(views)} views of {size} pixels: give one view or more, of 1 pixel or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: ranks are 0 to {world - 1}")
        if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device {str(chosen.device)!r}: this machine has no GPU that torch can use: give device='cpu'"
            )
        if batch % world:
            raise InputError(f"data.batch {batch} does not divide among {world} ranks: choose a multiple of {world}")
        self.beton, self.dtype, self.stall_timeout = beton, chosen.dtype, chosen.stall_timeout
        self.steps = steps_per_epoch(len(beton), batch)
        self._views, self._batch, self._seed, self._rank, self._world = views, batch, seed, rank, world
        self._order, self._order_version = order, sampling.VERSION
        self._shuffle, self._device = shuffle, numbered(chosen.device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        # Begin the views of the next batch early, where its crops are ready; not where ranks exchange views.
        self._stages = self._stream is not None and shuffle is None
        self._staged: Batch | Exception | None = None
        self._launched = deque[torch.cuda.Event]()  # before each of the last batches' steps
        self._epoch, self._step = 0, 0  # position of the next batch to return
        self._queue: PrefetchQueue[_Note] = chosen.queue(beton, self._sizes_of(None), batch // world)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        while self._epoch == epoch:
            yield self._next()

    def endless(self) -> Iterator[Batch]:
        """Yield batches without end, one epoch after another."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch and all it depends on: plain JSON values."""
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": self._seed,
            "batch": self._batch,
            "order": self._order,
            "order_version": self._order_version,
            "samples": len(self.beton),
            "fingerprint": self.beton.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, exactly. Raises InputError where seed, batch, order or data set differ.

        The order is that of the version that started the run; earlier ones did not state it.
        """
        current_state = self.state_dict()
        if state.get("order") == "chunked":  # its former name
            state = state | {"order": "quasi_random"}
        for key in ("seed", "batch", "order", "samples", "fingerprint"):
            if state.get(key) != current_state[key]:
                raise InputError(
                    f"{self.beton.path}: the loader's {key} is {current_state[key]!r}, the saved one "
                    f"{state.get(key)!r}: resume with the settings and the data the run was started with"
                )
        version = state.get("order_version", 1)
        if version not in range(1, sampling.VERSION + 1):
            raise InputError(
                f"{self.beton.path}: the saved order has version {version!r}, this one knows 1 to {sampling.VERSION}: "
                "resume with the version of Millrace that the run was started with"
            )
        self._staged = None
        if len(self._queue):
            self._queue.forget()
        self._order_version = version
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def close(self) -> None:
        """End the workers and drop the batches under way."""
        self._queue.close()

    def _next(self) -> Batch:
        """Return the next batch. Begin the views of the one after it, where its crops are ready."""
        batch, self._staged = self._staged or self._make(), None
        if isinstance(batch, Exception):
            raise batch
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            # Where steps cost the host nothing, as a CUDA graph does, it would queue them, and views, without bound.
            self._launched.append(stream.record_event())
            if len(self._launched) > _STEPS_AHEAD:
                self._launched.popleft().synchronize()
            stream.wait_stream(self._stream)
            for view in (*batch.views, *batch.shuffled.values()):
                if view is not None:
                    view.record_stream(stream)
        self._epoch, self._step = self._after(1)
        if self._stages and self._queue.backend.ready():
            try:
                self._staged = self._make()
            except Exception as error:  # raised when that batch is requested
                self._staged = error
        return batch

    def _make(self) -> Batch:
        """Return the oldest batch under way. On a GPU a separate stream makes its views."""
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            self._refill()
            start = time.perf_counter()
            crops, note = self._queue.receive(self.stall_timeout, self._refill)
            waited = time.perf_counter() - start
            shuffled, order = self._shuffled(crops, note.epoch, note.step)
            unneeded = self._shuffle.only if self._shuffle else ()
            views = tuple(
                None if index in unneeded else self._finished(crop, color)
                for index, (crop, color) in enumerate(zip(crops, note.colors, strict=True))
            )
            self._submit(*self._after(len(self._queue) + 1))
            return Batch(views, note.ids, note.epoch, note.step, waited, note.substituted, shuffled, order)

    def _finished(self, crops: torch.Tensor, color: Color) -> torch.Tensor:
        """Return the views of crops; a backend on the CPU has finished them."""
        return augment(crops, color, self._options.statistics, self.dtype) if self._stream else crops

    def _refill(self) -> None:
        """Submit batches until the queue is full."""
        while len(self._queue) < self._queue.depth:
            self._submit(*self._after(len(self._queue)))

    def _shuffled(
        self, crops: tuple[torch.Tensor, ...], epoch: int, step: int
    ) -> tuple[dict[int, torch.Tensor], np.ndarray | None]:
        """Return the shuffled views by index, and their permutation of the global batch."""
        if self._shuffle is None:
            return {}, None
        order = shuffled_rows(self._seed, epoch * self.steps + step, self._batch, self._shuffle.parts)
        rows = order[rank_positions(0, self._batch, self._rank, self._world)]
        ids = self._ids(epoch, step * self._batch + rows)
        views = {}
        for index in self._shuffle.views:
            if self._stream is None:  # finished: a view depends on its sample, not on its rank
                pixels = crops[index].permute(0, 2, 3, 1).view(torch.uint8)  # [B, S, S, bytes]
                views[index] = self._shuffle.exchange(pixels, order).view(self.dtype).permute(0, 3, 1, 2)
            else:
                color = draw_color(self._views[index], index, seed=self._seed, epoch=epoch, ids=ids)
                views[index] = self._finished(self._shuffle.exchange(crops[index], order), color)
        return views, order

    def _sizes_of(self, epoch: int | None) -> tuple[int, ...]:
        """Return the views' sides in an epoch; for None, the largest of all epochs."""
        size = max(self._sizes) if epoch is None else self._sizes[min(epoch, len(self._sizes) - 1)]
        return view_sizes(self._views, size)

    def _ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the ids at some positions of an epoch's order, int64 [m]."""
        return sampling.ids(self._order, self._seed, epoch, len(self.beton), positions, self._order_version)

    def _after(self, batches: int) -> tuple[int, int]:
        """Return epoch and step of the batch that is so many after the next one to return."""
        return divmod(self._epoch * self.steps + self._step + batches, self.steps)

    def _submit(self, epoch: int, step: int) -> None:
        ids = self._ids(epoch, rank_positions(step, self._batch, self._rank, self._world))
        records = self._queue.substitutes.resolve(ids)  # the draws remain those of the sample
        heights, widths = self.beton.heights[records], self.beton.widths[records]
        draws = draw_views(self._views, seed=self._seed, epoch=epoch, ids=ids, heights=heights, widths=widths)
        note = _Note(epoch, step, records, int((records != ids).sum()), [draw.color for draw in draws])
        sizes = self._sizes_of(epoch)
        self._queue.submit(Plan.from_draws(records, draws, sizes, self._options.packed(note.colors, sizes)), note)


class CenterLoader:
    """Samples `indices` (default: all) of `beton` in order, center-cropped, normalized: (images [B, 3, S, S], ids [B]).

    ids are the records that were read: where damaged ones are skipped, their substitutes. `crop_ratio`: the crop's
    side over the image's shorter side; 0.875 is the usual 224 of 256. size, batch and options: see `LoaderOptions`.
    """

    def __init__(
        self,
        beton: Beton,
        *,
        size: int,
        batch: int,
        crop_ratio: float = 0.875,
        indices: np.ndarray | None = None,
        **options: Unpack[OptionalKeywords],
    ) -> None:
        if not isinstance(size, int):
            raise ValueError(f"size is {size}: give one side, in pixels")
        self._options = chosen = LoaderOptions(size, batch, **options)
        self.size, self.indices = size, np.arange(len(beton)) if indices is None else indices
        self._beton, self._crop_ratio, self._device = beton, crop_ratio, numbered(chosen.device)
        self._batch = min(batch, max(len(self.indices), 1))
        self._queue: PrefetchQueue[np.ndarray] = chosen.queue(beton, (self.size,), self._batch)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.indices) // self._batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        if len(self._queue):  # left by an iteration that did not reach its end
            self._queue.forget()
        for number in range(len(self)):
            with current(self._device):
                crops, ids = self._queue.receive(self._options.stall_timeout, partial(self._refill, number))
                images = crops[0]
                if images.dtype == torch.uint8:
                    images = normalize(images, self._options.statistics, self._options.dtype)
            self._refill(number + 1)
            yield images, ids

    def _refill(self, first: int) -> None:
        """Submit batches until the queue is full; its oldest is batch number `first`."""
        for number in range(first + len(self._queue), min(first + self._queue.depth, len(self))):
            ids = self.indices[number * self._batch : (number + 1) * self._batch]
            records = self._queue.substitutes.resolve(ids)
            boxes = center_boxes(self._beton.heights[records], self._beton.widths[records], self._crop_ratio)
            colors = self._options.packed([Color.unchanged(len(records))], [self.size])
            plan = Plan(records, boxes[None], np.zeros((1, len(records)), np.uint8), (self.size,), colors=colors)
            self._queue.submit(plan, records)

    def close(self) -> None:
        """End the workers and drop the batches under way."""
        self._queue.close()
