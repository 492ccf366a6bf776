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
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from methods import norm_cpu

Norm = Callable[..., nn.modules.batchnorm._BatchNorm]
"""(channels, affine=True) to a BatchNorm layer."""
BatchNormKind = Literal["plain", "shuffle", "split", "sync"]
GROUPS = 8
SHUFFLED = ("shuffle", "split")


class Ranks(Protocol):
    """Ranks with batches of equal size, over which statistics are taken."""

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Return the tensors [1, ...] of all ranks, [world, ...]."""

    def sum(self, local: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks."""


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over [B, C] or [B, C, H, W] with training statistics of equal, consecutive parts of the batch.

    The batch contains `views` views, one after the other, and each view `groups` groups. Running statistics move as far
    as in one update by each view. A view that does not divide into `groups` groups of two samples or more is split into
    the most groups that are possible. `num_batches_tracked` is left to `count_batches`, which needs one kernel for all
    layers.

    On a GPU, several parts cost the kernels of one. With `ranks`, statistics are those of the parts of all ranks: one
    collective in the forward pass and one in the backward pass, without host-device synchronization.
    """

    def __init__(self, channels: int, groups: int = 1, *, affine: bool = True) -> None:
        super().__init__(channels, affine=affine)
        self.groups, self.views = groups, 1
        self.ranks: Ranks | None = None

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"expected [B, C] or [B, C, H, W], got {tuple(input.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        if self.ranks is not None:
            return self.normalize(x, self.ranks.gather(self.statistics(x)))
        running, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        parts, momentum = self._parts(x)
        if parts == 1:
            return F.batch_norm(x, *running, *affine, True, momentum, self.eps)
        if torch.compiler.is_compiling():
            return _fusible(x, *running, *affine, parts, momentum, self.eps)
        if parts > 2 and norm_cpu.available(x, *running, *affine):  # two parts gain about a fifth only
            return norm_cpu.normalize(x, *running, *affine, parts, momentum, self.eps)
        if not x.is_cuda:  # native code for each part: faster than torch's operations on all
            normalize = partial(F.batch_norm, training=True, momentum=momentum, eps=self.eps)
            return torch.cat([normalize(part, *running, *affine) for part in x.chunk(parts)])
        return self._normalize_parts(x, parts, momentum)

    def _normalize_parts(self, x: torch.Tensor, parts: int, momentum: float) -> torch.Tensor:
        """Return x with each part normalized by its own statistics, with the kernels of one part."""
        x = _channels_last(x)
        splits, length = _operations(x).moments(x, parts)
        return self._normalize(x, splits, length, momentum, x.numel() // x.shape[1] // parts)

    def statistics(self, x: torch.Tensor) -> torch.Tensor:
        """Return mean and variance of the parts of this rank's batch, [1, parts, 2, C], without gradient."""
        x, operations, (parts, _) = _channels_last(x), _operations(x), self._parts(x)
        splits, length = operations.moments(x, parts)
        if len(splits) == 1:
            return splits  # type: ignore[no-any-return]
        return operations.combine(splits, length, x.numel() // x.shape[1] // parts, None, 0.0)[None]  # type: ignore[no-any-return]

    def normalize(self, x: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        """Return x normalized by all ranks' statistics, [world, parts, 2, C]; they also move the running ones."""
        x, (parts, momentum) = _channels_last(x), self._parts(x)
        rows = x.numel() // x.shape[1] // parts
        return self._normalize(x, statistics, rows, momentum, rows * len(statistics))

    def _normalize(
        self, x: torch.Tensor, statistics: torch.Tensor, rows: int, momentum: float, count: int
    ) -> torch.Tensor:
        """Return x, channels-last, normalized by statistics [N, parts, 2, C] of `rows` values each, `count` in all."""
        operations, weight, bias = _operations(x), self.weight, self.bias
        combined = operations.combine(statistics, rows, count, (self.running_mean, self.running_var), momentum)
        if not torch.is_grad_enabled():  # spares autograd's preparations
            return operations.normalize(x, combined, weight, bias, self.eps)  # type: ignore[no-any-return]
        return _Normalize.apply(x, combined, weight, bias, count, self.eps, self.ranks)  # type: ignore[no-any-return]

    def _parts(self, x: torch.Tensor) -> tuple[int, float]:
        """Return the number of parts of a batch, and the running statistics' momentum for each."""
        samples = x.shape[0] // self.views
        groups = next(g for g in range(max(1, min(self.groups, samples // 2)), 0, -1) if samples % g == 0)
        # `groups` updates make one of self.momentum
        return self.views * groups, 1 - (1 - (self.momentum or 0.0)) ** (1 / groups)


class SplitBatchNorm(BatchNorm):
    """BatchNorm in GROUPS groups."""

    def __init__(self, channels: int, groups: int = GROUPS, *, affine: bool = True) -> None:
        super().__init__(channels, groups, affine=affine)


class ActivatedBatchNorm(BatchNorm):
    """A BatchNorm layer with dropout and activation after it, such as timm's BatchNormAct2d, with its key names."""

    def __init__(self, norm: BatchNorm, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(norm.num_features, norm.groups, affine=norm.affine)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def count_batches(module: nn.Module, count: int) -> None:
    """Add to `num_batches_tracked` of every `BatchNorm` of the module that is in training mode."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm) and m.training]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, count)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


class _Normalize(torch.autograd.Function):
    """Normalization by statistics [parts, 2, C], those of `count` values each; its gradient includes theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        statistics: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        count: int,
        eps: float,
        ranks: Ranks | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, statistics)
        ctx.count, ctx.eps, ctx.ranks = count, eps, ranks
        return _operations(x).normalize(x, statistics, weight, bias, eps)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        operations = _operations(x)
        gradient = _channels_last(gradients[0])
        local = operations.gradient_sums(gradient, x, statistics, ctx.eps)  # [parts, 2, C]
        sums = local if ctx.ranks is None else ctx.ranks.sum(local)
        x_gradient = operations.input_gradient(gradient, x, statistics, weight, sums, ctx.count, ctx.eps)
        bias_gradient, weight_gradient = local.sum(dim=0) if len(local) > 1 else local[0]
        if weight is None:
            bias_gradient = weight_gradient = None  # type: ignore[assignment]
        return x_gradient, None, weight_gradient, bias_gradient, None, None, None


def _operations(x: torch.Tensor) -> Any:
    if not x.is_cuda:
        return _TorchOperations
    from methods import norm_kernels

    return norm_kernels


class _TorchOperations:
    """The operations of `norm_kernels` in torch, for CPUs."""

    @staticmethod
    @torch.no_grad()
    def moments(x: torch.Tensor, parts: int) -> tuple[torch.Tensor, int]:
        rows = _rows(x, parts)
        var, mean = torch.var_mean(rows, dim=1, correction=0)
        return torch.stack([mean, var], dim=1)[None], rows.shape[1]

    @staticmethod
    @torch.no_grad()
    def combine(
        partial: torch.Tensor, rows: int, total: int, running: tuple[torch.Tensor, torch.Tensor] | None, momentum: float
    ) -> torch.Tensor:
        means, variances = partial.unbind(2)  # [N, parts, C], of equal counts
        mean = means.mean(dim=0)
        var = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        if running is not None:
            for part_mean, part_var in zip(mean, var, strict=True):
                running[0].lerp_(part_mean.to(running[0].dtype), momentum)
                running[1].lerp_((part_var * (total / (total - 1))).to(running[1].dtype), momentum)
        return torch.stack([mean, var], dim=1)

    @staticmethod
    def normalize(
        x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        mean, var = statistics[:, None].unbind(2)  # [parts, 1, C] each
        normal = (_rows(x, len(statistics)) - mean) * (var + eps).rsqrt()
        return _images(normal if weight is None or bias is None else normal * weight + bias, x)

    @staticmethod
    def gradient_sums(gradient: torch.Tensor, x: torch.Tensor, statistics: torch.Tensor, eps: float) -> torch.Tensor:
        parts = len(statistics)
        mean, var = statistics[:, None].unbind(2)
        slopes = _rows(gradient, parts)
        products = (slopes * (_rows(x, parts) - mean)).sum(dim=1) * (var[:, 0] + eps).rsqrt()
        return torch.stack([slopes.sum(dim=1), products], dim=1)

    @staticmethod
    def input_gradient(
        gradient: torch.Tensor,
        x: torch.Tensor,
        statistics: torch.Tensor,
        weight: torch.Tensor | None,
        sums: torch.Tensor,
        count: int,
        eps: float,
    ) -> torch.Tensor:
        parts = len(statistics)
        mean, var = statistics[:, None].unbind(2)
        one, two = (sums[:, None] / count).unbind(2)
        scale = (var + eps).rsqrt()
        slopes = _rows(gradient, parts) - one - (_rows(x, parts) - mean) * scale * two
        return _images(slopes * (scale if weight is None else scale * weight), x)


def _rows(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Return x [B, C] or channels-last [B, C, H, W] as [parts, rows, C], in float32 or better."""
    values = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
    return values.reshape(parts, -1, x.shape[1]).to(torch.promote_types(x.dtype, torch.float32))


def _images(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the inverse of `_rows`: a tensor of the shape, strides and dtype of `like`."""
    out = torch.empty_like(like)
    images = out if like.ndim == 2 else out.permute(0, 2, 3, 1)
    images.copy_(rows.view(images.shape))
    return out


def _fusible(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    parts: int,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """BatchNorm by parts in operations that torch.compile fuses, with one set of them for all parts."""
    rows = _rows(x, parts)
    var, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    normal = (rows - mean) * (var + eps).rsqrt()
    with torch.no_grad():
        count = rows.shape[1]
        decay = (1 - momentum) ** torch.arange(parts - 1, -1, -1, device=x.device, dtype=mean.dtype)[:, None]
        for running, values in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            assert running is not None
            moved = (values.detach()[:, 0] * decay).sum(dim=0) * momentum
            running.mul_((1 - momentum) ** parts).add_(moved)
    return _images(normal if weight is None or bias is None else normal * weight + bias, x)


def norm_layers(kind: BatchNormKind, groups: int = GROUPS) -> Norm:
    """Return the BatchNorm layer for images and vectors; `sync` layers get their ranks later, if there are several."""
    return partial(SplitBatchNorm, groups=groups) if kind in SHUFFLED else BatchNorm
