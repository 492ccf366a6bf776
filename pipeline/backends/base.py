"""The base of all backends: batches under way, in the order of their submission."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.augment.plan import Plan
from pipeline.beton import Beton
from pipeline.system.errors import LoaderStalled

_ABANDON_SECONDS = 5.0


@dataclass(frozen=True)
class BackendConfig:
    """Settings of a backend."""

    sizes: tuple[int, ...]
    """Largest side of each view's crops, pixels."""
    batch: int
    """Largest number of samples in a batch."""
    workers: int
    """Threads; 0: one for each core."""
    depth: int
    """Batches under way at most."""
    device: torch.device
    hw_decoder_load: float = 0.9
    """DALI only: share of the JPEGs for the GPU's hardware decoder, where it has one."""
    skipped: frozenset[int] = frozenset()
    """Samples that no plan will ask for."""


class UnderWay(NamedTuple):
    """A batch under way."""

    plan: Plan
    calls: Sequence[Future]
    """The calls that make it."""
    slot: int = 0
    """Number of its buffer."""


class Backend:
    """Turns plans into crops or views, several batches ahead. A subclass says how a batch is started and finished.

    Call `submit(plan)` for up to `depth` batches ahead, then `receive(timeout)` for each in the order of submission.
    """

    def __init__(self, beton: Beton, config: BackendConfig) -> None:
        self.depth, self._beton, self._config = config.depth, beton, config
        self._stream = torch.cuda.Stream(config.device) if config.device.type == "cuda" else None
        self._pending: deque[UnderWay] = deque()

    def _start(self, plan: Plan) -> UnderWay:
        """Start a batch."""
        raise NotImplementedError

    def _finish(self, batch: UnderWay) -> tuple[torch.Tensor, ...]:
        """Return the crops, or views, of a batch whose calls have ended."""
        raise NotImplementedError

    def submit(self, plan: Plan) -> None:
        """Start a batch; at most `depth` may be under way."""
        self._pending.append(self._start(plan))

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        """Return the crops of the oldest batch under way: uint8 [B, S, S, 3] for each view, on the device.

        Of a plan with colors, on the CPU: the augmented views [B, 3, S, S], normalized, channels-last.

        Raises DamagedRecord, which names the sample, and LoaderStalled after `timeout` seconds; the batch then remains
        the oldest.
        """
        return self._finish(self.wait(timeout))

    def wait(self, timeout: float) -> UnderWay:
        """Return the oldest batch under way, its calls ended. Raises as `receive`."""
        plan, calls, _ = self._pending[0]
        running = wait(calls, timeout).not_done
        for call in calls:
            if call not in running:
                call.result()  # raises the worker's error
        if running:
            raise LoaderStalled(
                f"{self._beton.path}: no batch for {timeout:g} s (samples {plan.ids[0]} and following): check the disk "
                "or network the file is on, or allow more with --data.stall-timeout"
            )
        return self._pending.popleft()

    def ready(self) -> bool:
        """Return whether the oldest batch needs no more work of the CPU."""
        return bool(self._pending) and all(call.done() for call in self._pending[0].calls)

    def forget(self) -> bool:
        """Drop the batches under way; return False where this backend can take no more and must be rebuilt."""
        running = [call for batch in self._pending for call in batch.calls if not call.cancel()]
        self._pending.clear()
        return not wait(running, _ABANDON_SECONDS).not_done

    def close(self) -> None:
        """Free threads and buffers."""
        self._pending.clear()
