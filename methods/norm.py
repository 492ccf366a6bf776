"""BatchNorm for contrastive learning: statistics of the full batch or of parts of it.

- plain: each rank's batch.
- sync: the global batch.
- split: GROUPS equal parts of each rank's batch, with the keys' samples shuffled within that batch.
- shuffle: GROUPS equal parts of the global batch (one a rank, if there are more ranks), with the keys' samples shuffled
  across all of it.

Without shuffling, a network could match key and query by their part's statistics (1911.05722, section 3.3).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

Norm = Callable[..., nn.modules.batchnorm._BatchNorm]
"""(channels, affine=True) to a BatchNorm layer."""
BatchNormKind = Literal["plain", "shuffle", "split", "sync"]
GROUPS = 8
SHUFFLED = ("shuffle", "split")


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over [B, C] or [B, C, H, W] with training statistics of `groups` equal parts of the batch.

    Running statistics move as far as in one update by the full batch. A batch that does not divide into `groups` parts
    of two samples or more is split into the most parts that are possible.
    """

    def __init__(self, channels: int, groups: int = GROUPS, *, affine: bool = True) -> None:
        super().__init__(channels, affine=affine)
        self.groups = groups

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"expected [B, C] or [B, C, H, W], got {tuple(input.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        groups = next(g for g in range(max(1, min(self.groups, len(x) // 2)), 0, -1) if len(x) % g == 0)
        momentum = 1 - (1 - (self.momentum or 0.0)) ** (1 / groups)  # `groups` updates make one of self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        parts = [
            F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)
            for part in x.chunk(groups)
        ]
        return torch.cat(parts)


def norm_layers(kind: BatchNormKind, groups: int = GROUPS) -> tuple[Norm, Norm]:
    """Return the BatchNorm layers for images and for vectors.

    `sync` layers are plain ones, to be converted where there are several ranks.
    """
    if kind in SHUFFLED:
        split = partial(SplitBatchNorm, groups=groups)
        return split, split
    return nn.BatchNorm2d, nn.BatchNorm1d
