"""The one room of collectives: what processes tell each other during a step."""

from __future__ import annotations

import torch
from torch import distributed

# torch 2.13 gives it a new name, and warns of the old one
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


def gather(local: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, [world * B, ...] in order of rank, without gradient; the input where alone."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return local
    everyone = local.new_empty((distributed.get_world_size() * len(local), *local.shape[1:]))
    _all_gather(everyone, local.detach().contiguous())
    return everyone


def mean(local: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes, the input where alone."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return local
    total = local.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
