"""BatchNorm's running statistics, which each rank computes from its own batches, and their mean over all ranks."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from engine.parallel import collectives
from engine.parallel.rendezvous import rank, world

_NAMES = ("running_mean", "running_var")


class RunningStatistics:
    """The running statistics of all BatchNorm layers of `modules`, N numbers in all; a module may be None."""

    def __init__(self, *modules: nn.Module | None) -> None:
        named = [pair for module in modules if module is not None for pair in module.named_buffers()]
        self._buffers = [buffer for name, buffer in named if name.rpartition(".")[2] in _NAMES]

    @torch.no_grad()
    def local(self) -> torch.Tensor:
        """Return this rank's statistics, [1, N], on the device."""
        return torch.cat([buffer.flatten() for buffer in self._buffers])[None] if self._buffers else torch.zeros(1, 0)

    @torch.no_grad()
    def put(self, row: torch.Tensor) -> None:
        """Set this rank's statistics to `row` [N]."""
        for buffer, values in zip(self._buffers, row.split([b.numel() for b in self._buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[torch.Tensor | None]:
        """Replace the statistics by their mean over all ranks in this context, so that all evaluate the same encoder.

        Yields every rank's statistics, [world, N], where they differ, else None. Called by all ranks.
        """
        rows = collectives.gather(self.local()) if self._buffers and world() > 1 else None
        if rows is None or (rows == rows[0]).all():
            yield None
            return
        self.put(rows.double().mean(dim=0).to(rows.dtype))
        try:
            yield rows
        finally:
            self.put(rows[rank()])
