"""Gradients in one buffer, averaged over all ranks in a few all-reduces during the backward pass."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed, nn

from engine.parallel.rendezvous import world
from methods.flat import flatten

_BUCKETS = 3  # few collectives, and two thirds of the bytes on their way before the backward pass ends


@dataclass
class _Bucket:
    """Parameters whose gradients are averaged in one all-reduce."""

    leaves: list[torch.Tensor]
    """The tensors that autograd computes gradients of: the parameters, or copies in low precision."""
    gradients: list[torch.Tensor]
    """Of the parameters, views of `flat`."""
    flat: torch.Tensor
    pending: set[int] = field(default_factory=set)
    """Positions of the leaves whose gradients are still to come in this backward pass."""
    work: Any = None


class Gradients:
    """The gradients of `parameters`, one buffer of their dtype, as means over all ranks.

    Used instead of DistributedDataParallel, which copies and scales each gradient by itself, one kernel for each
    parameter, and cannot be recorded in a CUDA graph before eleven steps have passed.

    leaves: the tensors that stand for parameters in the forward pass, such as copies in bfloat16.
    exchange: dtype in which ranks exchange them; None: the parameters'.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        leaves: Mapping[nn.Parameter, torch.Tensor] | None = None,
        exchange: torch.dtype | None = None,
    ) -> None:
        self._parameters, self._exchange = list(parameters), exchange
        backward = self._parameters[::-1]  # about the order in which the backward pass computes them
        gradients = [torch.empty_like(p, requires_grad=False) for p in backward]
        self.flat = flatten(gradients)
        """All gradients, 0 between them."""
        self._gradients = gradients[::-1]
        spans, leaves = _spans(gradients), leaves or {}
        starts = [gradients[span.start].storage_offset() for span in spans] + [self.flat.numel()]
        self._buckets = [
            _Bucket([leaves.get(p, p) for p in backward[span]], gradients[span], self.flat[begin:end])
            for span, begin, end in zip(spans, starts, starts[1:], strict=False)
        ]
        self._next = 0  # bucket to be exchanged: all ranks do it in one order
        self._first = self._last = True
        for number, bucket in enumerate(self._buckets):
            for position, leaf in enumerate(bucket.leaves):
                leaf.register_post_accumulate_grad_hook(_hook(weakref.ref(self), number, position))

    def begin(self, *, first: bool, last: bool) -> None:
        """Prepare for a backward pass, the first or the last of a step, which add up their gradients."""
        self._first, self._last, self._next = first, last, 0
        for bucket in self._buckets:
            bucket.pending, bucket.work = set(range(len(bucket.leaves))), None

    def finish(self) -> None:
        """Complete the backward pass; after the last one, each parameter's `grad` is the mean over all ranks."""
        for bucket in self._buckets[self._next :]:  # with leaves that the loss does not depend on
            self._collect(bucket)
        if not self._last:
            return
        for bucket in self._buckets:
            if bucket.work is not None:
                received = bucket.work()
                if received is not bucket.flat:
                    bucket.flat.copy_(received)
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient

    def discard(self) -> None:
        """Discard the gradients of an interrupted backward pass."""
        for bucket in self._buckets:
            for leaf in bucket.leaves:
                leaf.grad = None

    def arrived(self, bucket: int, position: int) -> None:
        """Note that the gradient of a leaf is complete; collect each bucket that has all."""
        self._buckets[bucket].pending.discard(position)
        while self._next < len(self._buckets) and not self._buckets[self._next].pending:
            self._collect(self._buckets[self._next])

    @torch.no_grad()
    def _collect(self, bucket: _Bucket) -> None:
        """Copy, or add, the gradients of a bucket into the buffer, and start to average it in the last pass."""
        self._next += 1
        missing = list[torch.Tensor]()
        by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # a kernel takes tensors of one dtype
        for gradient, leaf in zip(bucket.gradients, bucket.leaves, strict=True):
            if leaf.grad is None:
                missing.append(gradient)
            else:
                by_dtype.setdefault(leaf.grad.dtype, []).append((gradient, leaf.grad))
            leaf.grad = None
        if self._first and missing:
            torch._foreach_zero_(missing)
        for pairs in by_dtype.values():
            into, arrived = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            (torch._foreach_copy_ if self._first else torch._foreach_add_)(into, arrived)
        if self._last and world() > 1:
            bucket.work = self._average(bucket.flat)

    def _average(self, flat: torch.Tensor) -> Any:
        """Start to average a buffer over all ranks; return a function that waits, and returns the result."""
        flat.div_(world())
        sent = flat if self._exchange is None else flat.to(self._exchange)
        work = distributed.all_reduce(sent, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return sent

        return finish


def _hook(gradients: "weakref.ref[Gradients]", bucket: int, position: int) -> Callable[[torch.Tensor], None]:
    """Return a hook of a leaf. A strong reference would keep both forever: the garbage collector sees no hooks."""

    def hook(leaf: torch.Tensor) -> None:
        if (alive := gradients()) is not None:
            alive.arrived(bucket, position)

    return hook


def _spans(tensors: Sequence[torch.Tensor]) -> list[slice]:
    """Return consecutive spans of about equal bytes, `_BUCKETS` of them or fewer."""
    total, spans, begin, size = sum(t.numel() for t in tensors), list[slice](), 0, 0
    for end, tensor in enumerate(tensors, 1):
        size += tensor.numel()
        if size * _BUCKETS >= total * (len(spans) + 1) or end == len(tensors):
            spans.append(slice(begin, end))
            begin = end
    return spans
