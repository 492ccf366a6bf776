"""BatchNorm with the statistics of all ranks' batches."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.parallel import collectives
from engine.parallel.rendezvous import world
from methods.norm import BatchNorm


class AllRanks:
    """All ranks of the run (`methods.norm.Ranks`)."""

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Return the tensors [1, ...] of all ranks, [world, ...]."""
        return collectives.gather(local)

    def sum(self, local: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks."""
        return collectives.total(local)


def synchronize(module: nn.Module) -> nn.Module:
    """Return `module` with every BatchNorm synchronized over all ranks; parameters and buffers stay the same objects.

    Unlike torch's SyncBatchNorm it runs on CPUs too, does not wait for the device, and takes batches of equal size
    alone. On one rank the module is returned as it is.
    """
    if world() == 1:
        return module
    if isinstance(module, BatchNorm):
        module.ranks = AllRanks()
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, BatchNorm):
            synced = BatchNorm(child.num_features, affine=child.affine)
            synced.eps, synced.momentum, synced.training = child.eps, child.momentum, child.training
            synced.weight, synced.bias = child.weight, child.bias
            synced.running_mean, synced.running_var = child.running_mean, child.running_var
            synced.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, child := synced)
        synchronize(child)
    return module
