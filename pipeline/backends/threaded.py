"""Batches under way on worker threads, each in a buffer of its own; what backends that decode on the CPU share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

import torch

from pipeline.augment.plan import Plan
from pipeline.backends.base import Wanted
from pipeline.beton import Beton
from pipeline.system.cores import available_cores
from pipeline.system.errors import LoaderStalled
from pipeline.system.thread_pool import Workers

_CHUNKS = 4  # chunks a worker and batch: small enough to share out evenly, large enough to cost nothing
_PATIENCE = 5.0
Buffer = TypeVar("Buffer")
Work = Callable[[Any, Any, int, int, Buffer], None]
"""(a worker's own state, plan, first sample, end, buffer): fills the buffer for these samples, or raises."""


def stalled(beton: Beton, plan: Plan, timeout: float) -> LoaderStalled:
    """Return the error that says which batch did not come in time."""
    return LoaderStalled(
        f"{beton.path}: no batch for {timeout:g} s (samples {plan.ids[0]} and following): check the disk or network "
        "the file is on, or allow more with --data.stall_timeout"
    )


def abandon(futures: Sequence[Future]) -> bool:
    """Cancel what has not begun, and return whether the rest ended within a few seconds."""
    running = [future for future in futures if not future.cancel()]
    return not wait(running, _PATIENCE).not_done


class Ahead(Generic[Buffer]):
    """Up to `depth` batches, cut into chunks that worker threads fill; buffers are made once and come round.

    state: of each thread. buffer: makes one from whether it is to be pinned, as for a GPU, which copies on a stream of
    its own; a buffer is not filled anew before its copy is done. room: makes room in a buffer for a batch.
    """

    def __init__(
        self,
        beton: Beton,
        wanted: Wanted,
        work: Work,
        *,
        state: Callable[[], Any],
        buffer: Callable[[bool], Buffer],
        room: Callable[[Buffer, Any], None] = lambda buffer, plan: None,
    ) -> None:
        self._beton, self._work, self._room, self._device = beton, work, room, wanted.device
        self._stream = torch.cuda.Stream(wanted.device) if wanted.device.type == "cuda" else None
        self._buffers = [buffer(self._stream is not None) for _ in range(wanted.depth + 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._pending: deque[tuple[Plan, int, list[Future]]] = deque()
        self._next = 0
        self._count = wanted.workers or available_cores()
        self._workers = Workers(self._count, state)

    def begin(self, plan: Plan) -> None:
        """Begin a batch."""
        slot = self._next
        self._next = (slot + 1) % len(self._buffers)
        if (copied := self._copied[slot]) is not None:
            copied.synchronize()  # the copy of depth + 1 batches ago: over long since
        self._room(self._buffers[slot], plan)
        n = len(plan.ids)
        chunk = max(1, -(-n // (self._count * _CHUNKS)))
        spans = [(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        futures = [self._workers.submit(self._work, plan, *span, self._buffers[slot]) for span in spans]
        self._pending.append((plan, slot, futures))

    def finish(self, timeout: float) -> tuple[Plan, Buffer, int]:
        """Return the oldest batch's plan and buffer, and the buffer's number. Raises as `Backend.receive`."""
        plan, slot, futures = self._pending[0]
        under_way = wait(futures, timeout).not_done
        for future in futures:
            if future not in under_way:
                future.result()  # raises what the worker raised
        if under_way:
            raise stalled(self._beton, plan, timeout)
        self._pending.popleft()
        return plan, self._buffers[slot], slot

    def ready(self) -> bool:
        """Return whether the oldest batch is filled."""
        return bool(self._pending) and all(future.done() for future in self._pending[0][2])

    def on_device(self, tensors: Sequence[torch.Tensor], slot: int) -> tuple[torch.Tensor, ...]:
        """Return tensors of buffer `slot` on the device, without waiting for it; themselves, where that is the CPU."""
        if self._stream is None:
            return tuple(tensors)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
            self._copied[slot] = event = torch.cuda.Event()
            event.record()
        current.wait_event(event)
        for copy in copies:
            copy.record_stream(current)
        return copies

    def forget(self) -> bool:
        """Forget the batches under way; return whether none of them is stuck, so that others may follow."""
        futures = [future for _, _, futures in self._pending for future in futures]
        self._pending.clear()
        return abandon(futures)

    def close(self) -> None:
        """Forget the batches under way and end the threads."""
        self._pending.clear()
        self._workers.close()
