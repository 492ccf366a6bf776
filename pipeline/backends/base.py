"""The interface of a backend.

A backend is used as: `submit(plan)` for up to `depth` batches ahead, then `receive(timeout)` for each in the order
of submission. What `receive` returns stays valid until the next `submit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.augment.plan import Plan


@dataclass(frozen=True)
class Wanted:
    """What is asked of a backend."""

    sizes: tuple[int, ...]
    """Largest side of each view's crops, pixels."""
    batch: int
    """Samples at a time, at most."""
    workers: int
    """Threads; 0: as many as there are cores."""
    depth: int
    """Batches ahead."""
    device: torch.device
    hardware_load: float = 0.9
    """Share of the JPEGs for a GPU's hardware decoder, where DALI decodes and there is one."""
    left_out: frozenset[int] = frozenset()
    """Samples that will not be asked for."""


class Backend(Protocol):
    """Turns plans into crops, several batches ahead."""

    depth: int

    def submit(self, plan: Plan) -> None:
        """Begin a batch; at most `depth` may be under way."""

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        """Return the crops of the oldest batch under way: uint8 [B, S, S, 3] for each view, on the device.

        Raises DamagedRecord, naming the sample, and LoaderStalled after `timeout` seconds; that batch then stays the
        oldest.
        """

    def ready(self) -> bool:
        """Return whether the oldest batch under way is there, or will be without the CPU."""

    def forget(self) -> bool:
        """Forget the batches under way; return whether others may be submitted, else build another in its place."""

    def close(self) -> None:
        """Give back threads and buffers."""
