"""Synchronized BatchNorm: torch's on GPUs, and a plain one on CPUs, where torch has none."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.parallel import collectives
from engine.parallel.rendezvous import world


class CpuSyncBatchNorm(_BatchNorm):
    """BatchNorm over [B, C, ...] with training statistics over the batches, of equal size, of all ranks.

    Costs one collective forward and one backward.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        local = torch.stack(torch.var_mean(values, axes, correction=0))[None]  # [1, 2, C]
        variances, means = collectives.gather_with_gradient(local).unbind(1)  # [world, C] each
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        count = world() * x.numel() // x.shape[1]
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        normal = (values - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


def synchronize(module: nn.Module, device: torch.device) -> nn.Module:
    """Return `module` with every BatchNorm synchronized over all ranks; parameters stay the same objects.

    On one rank it is returned as it is.
    """
    if world() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synced = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            synced.weight, synced.bias = child.weight, child.bias
            synced.running_mean, synced.running_var = child.running_mean, child.running_var
            synced.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, synced)
        else:
            synchronize(child, device)
    return module
