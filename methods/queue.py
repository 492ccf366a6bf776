"""The key queue (1911.05722, section 3.2)."""

import torch
from torch import nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The newest K = `queue_size` keys [K, dim], rows of norm 1; the oldest are overwritten first.

    Wraps around, so any size works with any batch. Starts as random directions, the same on every rank. Keys and write
    position stay on the device: no host-device synchronization.

    dtype: bfloat16 halves the memory. A similarity is then off by at most 2^-9, the relative rounding error of a key's
    components (measured on random keys of 128 dimensions: 1e-4 on average, 8e-4 at most), a logit by that divided by
    the temperature.
    """

    keys: torch.Tensor
    position: torch.Tensor
    """Row of the next key, int64 [1]."""

    def __init__(self, queue_size: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("keys", F.normalize(torch.randn(queue_size, dim, generator=generator), dim=1).to(dtype))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def write(self, keys: torch.Tensor, condition: torch.Tensor | None = None) -> None:
        """Overwrite the oldest rows with `keys` [N, dim], the last K of them if N > K.

        Call it after the backward pass, which still reads the rows.
        condition: a bool tensor [] on the device; if false, nothing changes.
        """
        size, count = len(self.keys), len(keys)
        skipped = max(0, count - size)
        rows = (self.position + torch.arange(skipped, count, device=keys.device)) % size
        new_keys, new_position = keys[skipped:].to(self.keys.dtype), (self.position + count) % size
        if condition is not None:
            new_keys = torch.where(condition, new_keys, self.keys[rows])
            new_position = torch.where(condition, new_position, self.position)
        self.keys.index_copy_(0, rows, new_keys)
        self.position.copy_(new_position)
