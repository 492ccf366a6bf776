"""The key queue (1911.05722, section 3.2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The last `length` keys, [length, dim], rows of norm 1, oldest overwritten first.

    Any length with any batch: it wraps. It starts as random directions, the same on every rank. Keys and write position
    lie on the device, so that writing, or not writing, waits for nothing.

    dtype: bfloat16 halves the memory; a similarity to a key is then off by at most 2^-9, the relative rounding error of
    its components (random keys of 128 dimensions, measured: 1e-4 on average, 8e-4 at most), a logit by that over the
    temperature.
    """

    keys: torch.Tensor
    position: torch.Tensor
    """int64 [1]: the row of the next key."""

    def __init__(self, length: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("keys", F.normalize(torch.randn(length, dim, generator=generator), dim=1).to(dtype))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def write(self, keys: torch.Tensor, condition: torch.Tensor | None = None) -> None:
        """Overwrite the oldest rows by `keys` [N, dim]; of more than the queue's length the last remain.

        condition: one bool on the device; where it is false nothing changes. Call it after the backward pass, which
        still reads the rows.
        """
        length, count = len(self.keys), len(keys)
        left_out = max(0, count - length)
        rows = (self.position + torch.arange(left_out, count, device=keys.device)) % length
        fresh, moved = keys[left_out:].to(self.keys.dtype), (self.position + count) % length
        if condition is not None:
            fresh = torch.where(condition, fresh, self.keys[rows])
            moved = torch.where(condition, moved, self.position)
        self.keys.index_copy_(0, rows, fresh)
        self.position.copy_(moved)
