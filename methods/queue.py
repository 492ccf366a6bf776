"""The key queue (1911.05722, section 3.2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The last `length` keys, [length, dim], rows of norm 1, oldest overwritten first.

    Any length with any batch: it wraps. It starts as random directions, the same on every rank. The write position is a
    plain number kept on the host, so that writing waits for nothing; save it along with the state dict.
    """

    keys: torch.Tensor

    def __init__(self, length: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("keys", F.normalize(torch.randn(length, dim, generator=generator), dim=1))
        self.position = 0

    @torch.no_grad()
    def write(self, keys: torch.Tensor) -> None:
        """Overwrite the oldest rows by `keys` [N, dim]; of more than `length` keys the last remain.

        Call it after the backward pass, which still reads the rows.
        """
        length = len(self.keys)
        start = (self.position + max(0, len(keys) - length)) % length
        self.position = (self.position + len(keys)) % length
        keys = keys[-length:]
        first = min(length - start, len(keys))
        self.keys[start : start + first].copy_(keys[:first])
        self.keys[: len(keys) - first].copy_(keys[first:])
