"""The key queue (1911.05722, section 3.2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The last `length` keys, [length, dim], rows of norm 1, oldest overwritten first.

    Any length with any batch: it wraps. It starts as random directions, the same on every rank. The write position is a
    plain number kept on the host, so that writing waits for nothing; save it along with the state dict.

    dtype: bfloat16 halves the memory; a similarity to a key is then off by at most 2^-9, the relative rounding error of
    its components (random keys of 128 dimensions, measured: 1e-4 on average, 8e-4 at most), a logit by that over the
    temperature.
    """

    keys: torch.Tensor

    def __init__(self, length: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("keys", F.normalize(torch.randn(length, dim, generator=generator), dim=1).to(dtype))
        self.position = 0

    def slots(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of the next `count` keys, at most the queue's length: up to its end, then from its start."""
        first = min(len(self.keys) - self.position, count)
        return self.keys[self.position : self.position + first], self.keys[: count - first]

    def advance(self, count: int) -> None:
        """Move the write position past `count` keys that were written."""
        self.position = (self.position + count) % len(self.keys)

    @torch.no_grad()
    def write(self, keys: torch.Tensor) -> None:
        """Overwrite the oldest rows by `keys` [N, dim]; of more than the queue's length the last remain.

        Call it after the backward pass, which still reads the rows.
        """
        self.advance(max(0, len(keys) - len(self.keys)))
        keys = keys[-len(self.keys) :]
        end, start = self.slots(len(keys))
        end.copy_(keys[: len(end)])
        start.copy_(keys[len(end) :])
        self.advance(len(keys))
