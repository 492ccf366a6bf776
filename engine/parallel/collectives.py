"""Collectives of the training step; everything in it that ranks exchange goes through here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from engine.parallel.rendezvous import rank, world
from pipeline.system.device import to_device

# torch 2.13 renames it, and warns of the old name
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


def shares(indices: np.ndarray) -> list[np.ndarray]:
    """Return each rank's share of `indices` [N]: consecutive ones, in shares of nearly equal length."""
    return np.array_split(indices, world())


def gather(local: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, [world * B, ...] in order of rank, without gradient; on one rank the input."""
    return gather_later(local)()


def gather_uneven(local: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the rows of all ranks in order of rank, counts[rank] of each; on one rank the input."""
    if world() == 1:
        return local
    longest = max(counts)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local
    parts = gather(padded).split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_later(local: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to gather like `gather`, overlapped with the work that follows; call the result for the rows."""
    source = local.detach()
    if world() == 1:
        return lambda: source
    source = source.contiguous()
    rows = source.new_empty((world() * len(source), *source.shape[1:]))
    work = _all_gather(rows, source, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return rows

    return finish


def gather_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks like `gather`, with the gradient of the sum of all ranks' losses."""
    return local if world() == 1 else _Gather.apply(local)


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int]]]:
    """Return the name of the dtype and the shape of each tensor: plain values, which `broadcast` takes."""
    return {name: (str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in tensors.items()}


def broadcast(
    tensors: dict[str, torch.Tensor], like: Mapping[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return rank 0's tensors, on the device, on every rank; like: `described` of them."""
    received = {}
    for name, (dtype, shape) in like.items():
        tensor = (
            tensors[name].to(device) if rank() == 0 else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        )
        received[name] = tensor.contiguous()
        if world() > 1:
            distributed.broadcast(received[name], 0)
    return received


def mean(local: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all ranks; on one rank the input."""
    return local if world() == 1 else total(local) / world()


def broadcast_parameters(module: nn.Module) -> None:
    """Give all ranks the parameters of rank 0, before a momentum copy is made."""
    parameters = [p.detach() for p in module.parameters()]
    if world() == 1 or not parameters:
        return
    row = torch.cat([p.flatten() for p in parameters])
    distributed.broadcast(row, 0)
    for p, values in zip(parameters, row.split([p.numel() for p in parameters]), strict=True):
        p.copy_(values.view_as(p))


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks the buffers of rank 0."""
    buffers = dict(module.named_buffers())
    if world() == 1 or not buffers:
        return
    device = next(iter(buffers.values())).device
    for name, value in broadcast(buffers, described(buffers), device).items():
        buffers[name].copy_(value)


def exchange(rows: torch.Tensor, order: np.ndarray, group: distributed.ProcessGroup | None = None) -> torch.Tensor:
    """Return this rank's share of all ranks' rows in the order `order`.

    rows [B, ...] of each rank; order a permutation of world * B, the same on all. Rank r receives the rows
    order[r * B : (r + 1) * B]. Rows that stay within each rank are not sent.
    """
    count = len(rows)
    owner, position = np.divmod(order, count)
    receiver = np.repeat(np.arange(world()), count)  # receiving rank of each row of `order`
    outgoing, incoming = owner == rank(), receiver == rank()
    if (owner == receiver).all():
        return rows[to_device(position[incoming], rows.device)]
    sent = rows[to_device(position[outgoing], rows.device)]  # in order of receiver
    arrival = np.argsort(owner[incoming], kind="stable")  # rows arrive in order of owner
    received = torch.empty_like(sent)
    splits = [np.bincount(ranks, minlength=world()).tolist() for ranks in (owner[incoming], receiver[outgoing])]
    distributed.all_to_all_single(received, sent, splits[0], splits[1], group)
    return received[to_device(np.argsort(arrival), rows.device)]


def total(local: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks."""
    summed = local.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        return gather(local)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return total(gradients[0]).chunk(world())[rank()]
