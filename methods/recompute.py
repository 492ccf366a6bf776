"""Activation checkpointing (1604.06174): blocks that recompute their activations in the backward pass."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A block that, with `recompute` set, saves only its input for the backward pass. Subclasses define `compute`.

    Running statistics are updated once, in the forward pass.
    """

    recompute = False

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self.compute(x)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw nothing
        if not torch.compiler.is_compiling():  # compiled code updates the statistics only once
            options["context_fn"] = lambda: (contextlib.nullcontext(), _frozen_statistics(self))
        return checkpoint(self.compute, x, **options)


def recompute(module: nn.Module) -> None:
    """Turn on recomputing in all blocks of the module."""
    for block in module.modules():
        if isinstance(block, Recomputable):
            block.recompute = True


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """A context without updates of running statistics and of their step count."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in before:
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
