"""BatchNorm's running statistics, which each process keeps of its own batches, and their mean over all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from engine.parallel import collectives

_NAMES = ("running_mean", "running_var")


class RunningStatistics:
    """Those of all BatchNorm layers of `modules`, N numbers in all. A module that is None has none."""

    def __init__(self, *modules: nn.Module | None) -> None:
        named = [pair for module in modules if module is not None for pair in module.named_buffers()]
        self._own = [buffer for name, buffer in named if name.rpartition(".")[2] in _NAMES]

    @torch.no_grad()
    def own(self) -> torch.Tensor:
        """Return this process's, [1, N], on the device."""
        return torch.cat([buffer.flatten() for buffer in self._own])[None] if self._own else torch.zeros(1, 0)

    @torch.no_grad()
    def rows(self) -> torch.Tensor:
        """Return every process's, [world, N], on the device. Called by all processes."""
        return collectives.gather(self.own())

    @torch.no_grad()
    def put(self, row: torch.Tensor) -> None:
        """Set this process's to `row` [N]."""
        for buffer, values in zip(self._own, row.split([b.numel() for b in self._own]), strict=True):
            buffer.copy_(values.view_as(buffer))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[torch.Tensor | None]:
        """Have the mean of all processes' in their place meanwhile: one encoder, whichever process is asked.

        Gives all rows, [world, N], where they differ, else None. Called by all processes.
        """
        rows = self.rows() if self._own and collectives.world() > 1 else None
        if rows is None or (rows == rows[0]).all():
            yield None
            return
        self.put(rows.double().mean(dim=0).to(rows.dtype))
        try:
            yield rows
        finally:
            self.put(rows[collectives.rank()])
