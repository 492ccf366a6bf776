"""The base of backends that decode on the CPU: worker threads fill one buffer for each batch under way."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from pipeline.augment.plan import Plan
from pipeline.backends.base import Backend, BackendConfig, UnderWay
from pipeline.beton import Beton
from pipeline.storage.decode import Records, records_of
from pipeline.system.cores import available_cores
from pipeline.system.thread_pool import Workers

_CHUNKS_PER_WORKER = 4  # chunks of a batch: enough to share out evenly, few enough to cost nothing
Buffer = TypeVar("Buffer")


class ThreadedBackend(Backend, Generic[Buffer]):
    """A backend whose subclass says how a buffer is made, filled and turned into crops.

    Each batch is cut into chunks, which the workers fill. There are depth + 1 buffers, made once and used in turn. For
    a GPU they are pinned and copied on a stream of this backend; a buffer is filled again only after its copy.

    records: of all samples, where they are not the beton's own.
    """

    def __init__(self, beton: Beton, config: BackendConfig, records: Records | None = None) -> None:
        super().__init__(beton, config)
        self._records = records
        self._buffers = [self._new_buffer(pinned=self._stream is not None) for _ in range(config.depth + 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._next = 0
        self._worker_count = config.workers or available_cores()
        self._workers = Workers(self._worker_count, self._worker_state)

    def _new_buffer(self, pinned: bool) -> Buffer:
        raise NotImplementedError

    def _records_of(self, ids: np.ndarray) -> Records:
        """Return the records of samples `ids`, int64 [n], for compiled code."""
        return self._records.take(ids) if self._records else records_of(self._beton, ids)

    def _worker_state(self) -> Any:
        """Return the first argument of `_fill`, made once for each worker."""

    def _prepare(self, plan: Plan, buffer: Buffer) -> Plan:
        """Make room in the buffer for a batch; return its plan, with additions where `_fill` needs them."""
        return plan

    def _fill(self, state: Any, plan: Plan, start: int, stop: int, buffer: Buffer) -> None:
        """Fill the buffer for samples start..stop of the plan. Raises DamagedRecord."""
        raise NotImplementedError

    def _crops(self, plan: Plan, buffer: Buffer, slot: int) -> tuple[torch.Tensor, ...]:
        """Return the crops of a filled buffer, number `slot`, on the device."""
        raise NotImplementedError

    def _to_device(self, tensors: Sequence[torch.Tensor], slot: int) -> tuple[torch.Tensor, ...]:
        """Return tensors of buffer `slot` on the device, without waiting for the copy; on the CPU, unchanged."""
        if self._stream is None:
            return tuple(tensors)
        device = self._config.device
        current = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._stream):
            copies = tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
            self._copied[slot] = event = torch.cuda.Event()
            event.record()
        current.wait_event(event)
        for copy in copies:
            copy.record_stream(current)
        return copies

    def _start(self, plan: Plan) -> UnderWay:
        slot = self._next
        self._next = (slot + 1) % len(self._buffers)
        if (copied := self._copied[slot]) is not None:
            copied.synchronize()  # no wait in practice: the copy is depth + 1 batches old
        buffer = self._buffers[slot]
        plan = self._prepare(plan, buffer)
        n = len(plan.ids)
        chunk = max(1, -(-n // (self._worker_count * _CHUNKS_PER_WORKER)))
        spans = [(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        return UnderWay(plan, [self._workers.submit(self._fill, plan, *span, buffer) for span in spans], slot)

    def _finish(self, batch: UnderWay) -> tuple[torch.Tensor, ...]:
        return self._crops(batch.plan, self._buffers[batch.slot], batch.slot)

    def close(self) -> None:
        super().close()
        self._workers.close()
