"""The interface of a backend.

Call `submit(plan)` for up to `depth` batches ahead, then `receive(timeout)` for each in the order of submission. The
crops that `receive` returns stay valid until the next `submit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.augment.plan import Plan


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


class Backend(Protocol):
    """Turns plans into crops, several batches ahead."""

    depth: int

    def submit(self, plan: Plan) -> None:
        """Start a batch; at most `depth` may be under way."""

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        """Return the crops of the oldest batch under way: uint8 [B, S, S, 3] for each view, on the device.

        Raises DamagedRecord, which names the sample, and LoaderStalled after `timeout` seconds; the batch then remains
        the oldest.
        """

    def ready(self) -> bool:
        """Return whether the oldest batch needs no more work of the CPU."""

    def forget(self) -> bool:
        """Drop the batches under way; return False where this backend can take no more and must be rebuilt."""

    def close(self) -> None:
        """Free threads and buffers."""
