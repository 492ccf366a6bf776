"""BatchNorm for contrastive learning: statistics over the whole batch or over parts of it."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from methods.encoders import Norm

BatchNormKind = Literal["plain", "split", "sync"]
GROUPS = 8


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of `groups` equal parts of the batch, each its own.

    On one device this stands for the eight devices of MoCo (1911.05722, section 3.3), whose batch statistics would
    otherwise tell the encoder which key belongs to which query. Running statistics move as far as those of one
    update over the whole batch. A batch that cannot be split into `groups` equal parts of two or more is split into
    as many as can be.
    """

    def __init__(self, channels: int, groups: int = GROUPS) -> None:
        super().__init__(channels)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        groups = next(g for g in range(max(1, min(self.groups, len(x) // 2)), 0, -1) if len(x) % g == 0)
        momentum = 1 - (1 - (self.momentum or 0.0)) ** (1 / groups)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        parts = [
            F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)
            for part in x.chunk(groups)
        ]
        return torch.cat(parts)


def norm_layer(kind: BatchNormKind, groups: int = GROUPS) -> Norm:
    """Return the BatchNorm layer of that kind: `plain` and `sync` differ only once converted for several processes."""
    return partial(SplitBatchNorm2d, groups=groups) if kind == "split" else nn.BatchNorm2d
