"""The one room of collectives: what processes tell each other during a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed

from pipeline.system.device import to_device

# torch 2.13 gives it a new name, and warns of the old one
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


def world() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's number."""
    return distributed.get_rank() if world() > 1 else 0


def shares(indices: np.ndarray) -> list[np.ndarray]:
    """Return each process's share of those indices [N]: runs of neighbors, of lengths as even as can be."""
    return np.array_split(indices, world())


def gather(local: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, [world * B, ...] in order of rank, without gradient; the input where alone."""
    if world() == 1:
        return local.detach()
    everyone = local.new_empty((world() * len(local), *local.shape[1:]))
    _all_gather(everyone, local.detach().contiguous())
    return everyone


def gather_uneven(local: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the rows of all processes in order of rank, of which each has counts[rank]; the input where alone."""
    if world() == 1:
        return local
    most = max(counts)
    padded = local.new_zeros(most, *local.shape[1:])
    padded[: len(local)] = local
    everyone = gather(padded).split(most)
    return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int]]]:
    """Return the name of the dtype and the shape of each tensor: plain values, which `broadcast` takes."""
    return {name: (str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in tensors.items()}


def broadcast(
    tensors: dict[str, torch.Tensor], like: Mapping[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return, on every process, the first one's tensors, on the device; like: of each what `described` says."""
    found = {}
    for name, (dtype, shape) in like.items():
        tensor = (
            tensors[name].to(device) if rank() == 0 else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        )
        found[name] = tensor.contiguous()
        if world() > 1:
            distributed.broadcast(found[name], 0)
    return found


def gather_later(local: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to gather as `gather` does, beside whatever comes next; the call that is returned gives the result."""
    if world() == 1:
        return lambda: local.detach()
    own = local.detach().contiguous()
    everyone = own.new_empty((world() * len(own), *own.shape[1:]))
    under_way = _all_gather(everyone, own, async_op=True)

    def finish() -> torch.Tensor:
        under_way.wait()
        return everyone

    return finish


def gather_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes as `gather`, with gradient: of the sum of all processes' losses."""
    return local if world() == 1 else _Gather.apply(local)


def mean(local: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes, the input where alone."""
    return local if world() == 1 else _summed(local) / world()


def mean_in_bfloat16(bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Exchange a bucket of gradients in bfloat16: a hook of DistributedDataParallel, which takes their mean.

    As torch's own hook of that kind, which refuses processes without NCCL.
    """
    gradients = bucket.buffer()
    half = gradients.to(torch.bfloat16).div_(world())
    under_way = distributed.all_reduce(half, async_op=True).get_future()
    return under_way.then(lambda done: gradients.copy_(done.value()[0]))


def exchange(rows: torch.Tensor, order: np.ndarray) -> torch.Tensor:
    """Return this process's share of all processes' rows in the order `order`.

    rows [B, ...] of each process; order a permutation of world * B, the same on all: process r is given the rows
    order[r * B : (r + 1) * B]. What stays within each process is not sent.
    """
    count, number = len(rows), rank()
    owner, at = np.divmod(order, count)
    asked = np.repeat(np.arange(world()), count)  # who asks for each row of `order`
    if (owner == asked).all():
        return rows[to_device(at[asked == number], rows.device)]
    given, wanted = owner == number, asked == number
    sent = rows[to_device(at[given], rows.device)]  # in the order of who asks
    arrival = np.argsort(owner[wanted], kind="stable")  # they come in the order of who owns them
    received = torch.empty_like(sent)
    splits = [np.bincount(who, minlength=world()).tolist() for who in (owner[wanted], asked[given])]
    distributed.all_to_all_single(received, sent, *splits)
    return received[to_device(np.argsort(arrival), rows.device)]


def _summed(local: torch.Tensor) -> torch.Tensor:
    total = local.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        return gather(local)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _summed(gradients[0]).chunk(world())[rank()]
