"""One training step: momentum encoder, online encoder, terms, backward, optimiser, moving average, queue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from engine import ranks, watch
from methods import momentum
from methods.base import Embeddings, Objective, Part, total
from methods.heads import Encoder
from methods.queue import KeyQueue
from pipeline.loader import Batch
from pipeline.transfer import to_device

Tensors = dict[str, torch.Tensor]


@dataclass
class Result:
    """What a step tells of itself; scalars on the device, without gradient."""

    parts: Tensors
    """The loss, and its parts without their weights."""
    q: torch.Tensor
    """Online embeddings of the first view, [B, C], of the last part of the batch."""
    measures: Tensors = field(default_factory=dict)
    """Of `watch.measure`, where asked for, and `gradient_share_NAME` of each part."""


class Step:
    """Trains on one batch when called. Nothing in it waits for the device but fp16's check for an overflow.

    Only the embeddings that the objective needs are computed. Keys come first, for the whole batch; queries follow in
    `accumulate` parts, each of which meets the keys of the whole global batch. A step whose gradients overflowed in
    fp16 leaves parameters, momentum parameters and queue as they were.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        online: nn.Module,
        target: Encoder | None,
        queue: KeyQueue | None,
        objective: Objective,
        optimiser: Any,
        *,
        accumulate: int = 1,
        clip: float = 0.0,
        gradient_shares: bool = False,
    ) -> None:
        self._accelerator, self._online, self._target = accelerator, online, target
        self.encoder: Encoder = accelerator.unwrap_model(online)
        """The online encoder, unwrapped."""
        self._queue, self.objective, self._optimiser = queue, objective, optimiser
        self._accumulate, self._clip, self._shares = accumulate, clip, gradient_shares
        self._moving = momentum.parameter_pairs(target, self.encoder) if target else None
        needs = objective.needs if target else {name.replace("k", "q").replace("K", "Q") for name in objective.needs}
        self._queries = sorted({int(name[1]) for name in needs if name[0] in "qQ"})
        self._keys = sorted({int(name[1]) for name in needs if name[0] in "kK"})
        self._everyone = sorted((name for name in objective.needs if name[0] in "QK"), reverse=True)  # Q before K

    def __call__(self, batch: Batch, ema: float, *, measured: bool = False) -> Result:
        """Train on `batch`; `ema` is the share of itself that the momentum encoder keeps after it.

        measured: also return the measures, which wait for the device. They cost a momentum forward pass where the first
        view's keys are not there or are shuffled, and change nothing.
        """
        keys, all_keys = self._encode_keys(batch)
        results = []
        for part in range(self._accumulate):
            last = part == self._accumulate - 1
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._online):
                results.append(self._train_on(batch, part, keys, all_keys, measured and last))
        if self._clip:
            self._accelerator.clip_grad_norm_(self._online.parameters(), self._clip)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        if not self._optimiser.step_was_skipped:
            self._follow(ema, keys, all_keys)
        parts = {name: torch.stack([r.parts[name] for r in results]).mean() for name in results[0].parts}
        return Result(parts, results[-1].q, results[-1].measures)

    def _encode_keys(self, batch: Batch) -> tuple[Tensors, Tensors]:
        """Return this process's keys by name, k1 or k2 or both, [B, C], and those of all processes that are needed.

        Shuffled samples' keys come back to the processes whose samples they are (1911.05722, section 3.3).
        """
        if self._target is None:
            return {}, {}
        views = [_present(batch.shuffled.get(number - 1, batch.views[number - 1])) for number in self._keys]
        with torch.no_grad(), self._accelerator.autocast():
            found = [self._target(*part) for part in zip(*(v.chunk(self._accumulate) for v in views), strict=True)]
        keys = {f"k{number}": torch.cat(of) for number, of in zip(self._keys, zip(*found, strict=True), strict=True)}
        if batch.order is None:
            return keys, {name: ranks.gather(keys[name.lower()]) for name in self._everyone if name[0] == "K"}
        back = to_device(np.argsort(batch.order), keys[f"k{self._keys[0]}"].device)
        everyone = {name.upper(): ranks.gather(k)[back] for name, k in keys.items()}
        return {name.lower(): k.chunk(ranks.world())[ranks.rank()] for name, k in everyone.items()}, everyone

    def _train_on(self, batch: Batch, part: int, keys: Tensors, all_keys: Tensors, measured: bool) -> Result:
        """Run forward and backward on a part of the batch."""
        views = {n: _present(batch.views[n - 1]).chunk(self._accumulate)[part] for n in self._queries}
        named = dict(zip((f"q{n}" for n in self._queries), self._online(*views.values()), strict=True))
        named |= {name: k.chunk(self._accumulate)[part] for name, k in keys.items()}
        if self._target is None:
            named |= {f"k{n}": named[f"q{n}"] for n in self._queries}
        rows = len(named[f"q{self._queries[0]}"])
        first = (ranks.rank() * self._accumulate + part) * rows
        for name in self._everyone:
            named[name] = all_keys[name] if name in all_keys else self._gathered(named, name)
        e = Embeddings(named, None if self._queue is None else self._queue.keys, first)
        parts = self.objective(e)
        loss = total(parts)
        measures = self._measures(e, parts, views, batch.order is not None) if measured else {}
        self._accelerator.backward(loss / self._accumulate)
        values = {"loss": loss.detach(), **{name: p.value.detach() for name, p in parts.items()}}
        return Result(values, named[f"q{self._queries[0]}"].detach(), measures)

    def _gathered(self, named: Tensors, name: str) -> torch.Tensor:
        """Return all processes' rows of a query, with gradient; once where SimCLR's queries serve as keys too."""
        query = f"Q{name[1]}"
        return named[query] if query in named else ranks.gather_with_gradient(named[query.lower()])

    def _measures(
        self, e: Embeddings, parts: dict[str, Part], views: dict[int, torch.Tensor], shuffled: bool
    ) -> Tensors:
        """Return the measures. The gap's key shares its query's batch statistics in every run: shuffled keys do not."""
        a, _ = self.objective.base.pairs[0]
        if self._target is not None and (shuffled or f"k{a}" not in e.named):
            with torch.no_grad(), self._accelerator.autocast(), _unchanged_buffers(self._target):
                e = Embeddings({**e.named, f"k{a}": self._target(views[a])[0]}, e.queue, e.first)
        found = watch.measure(e, self.objective.base)
        return {**found, **(self._gradient_shares(e, parts) if self._shares else {})}

    def _gradient_shares(self, e: Embeddings, parts: dict[str, Part]) -> Tensors:
        """Return each weighted part's gradient norm at the online embeddings, as a share of the sum of these."""
        queries = [e[f"q{n}"] for n in self._queries]
        norms = []
        for part in parts.values():
            loss = part.weight * part.value
            gradients = torch.autograd.grad(loss, queries, retain_graph=True, allow_unused=True)
            norms.append(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        whole = torch.stack(norms).sum()
        return {f"gradient_share_{name}": norm / whole for name, norm in zip(parts, norms, strict=True)}

    @torch.no_grad()
    def _follow(self, ema: float, keys: Tensors, all_keys: Tensors) -> None:
        """Move the momentum encoder, and put the keys of this step into the queue: one a sample."""
        if self._moving is not None:
            momentum.update(*self._moving, ema)
        if self._queue is None:
            return
        name = f"k{self.objective.base.pairs[0][1]}"
        count = ranks.world() * len(keys[name])
        rest, start = self._queue.slots(count)
        if name.upper() in all_keys:
            self._queue.write(all_keys[name.upper()])
        elif len(rest) == count and not len(start):
            ranks.gather_into(rest, keys[name])
            self._queue.advance(count)
        else:
            self._queue.write(ranks.gather(keys[name]))


def _present(view: torch.Tensor | None) -> torch.Tensor:
    assert view is not None, "the loader left out a view that is needed"
    return view


@contextlib.contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """A context after which the module's buffers, such as running statistics, are as before."""
    buffers = list(module.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        torch._foreach_copy_(buffers, kept)
