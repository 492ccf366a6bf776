"""Backends: records to cropped, resized and flipped uint8 views. One file each, one `build` each, found by name.

A backend is used as: `submit(plan)` for up to `depth` batches ahead, then `receive(timeout)` for each in the order
of submission. What `receive` returns stays valid until the next `submit`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipeline.beton import Beton
from pipeline.draws import ViewDraws
from pipeline.errors import InputError

BACKENDS = ("ffcv", "ffcv_gpu", "dali", "resident")


@dataclass(frozen=True)
class Plan:
    """What one batch shall hold."""

    ids: np.ndarray
    """int64 [B]."""
    boxes: np.ndarray
    """int32 [V, B, 4]: top, left, height, width, inside the stored image."""
    flips: np.ndarray
    """bool [V, B]."""
    sizes: tuple[int, ...]
    """Side of each view's crops, pixels."""

    @staticmethod
    def of(ids: np.ndarray, drawn: Sequence[ViewDraws], sizes: tuple[int, ...]) -> Plan:
        """Return the plan of records `ids` (int64 [B]) by the draws of their views."""
        return Plan(ids, np.stack([d.boxes for d in drawn]), np.stack([d.flips for d in drawn]), sizes)


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


def build(name: str, beton: Beton, wanted: Wanted) -> Backend:
    """Return backend `name`. Raises InputError where there is none of that name, or it cannot read this data."""
    if name not in BACKENDS:
        raise InputError(f"data.backend {name!r} is not one of {', '.join(BACKENDS)}: choose one of these")
    if not beton.in_one_file and name != "dali":
        raise InputError(
            f"data.backend {name!r}: {beton.path} is not one file, which only dali reads directly: choose dali, or "
            "write a beton with python -m pipeline.prepare"
        )
    return importlib.import_module(f"pipeline.backends.{name}").build(beton, wanted)
