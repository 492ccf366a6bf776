"""One training step: momentum encoder, online encoder, terms, backward, optimizer, moving average, queue."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from engine.monitoring import embedding_metrics
from engine.monitoring.step_result import Result, Tensors
from engine.optim.schedule import Schedule
from engine.parallel import collectives
from engine.training.cuda_graph import Graph
from methods.base import Embeddings, Objective, Part, total
from methods.flat import Buffers
from methods.heads import Encoder
from methods.momentum import MovingAverage
from methods.queue import KeyQueue
from pipeline.loader import Batch
from pipeline.system.device import to_device


class Inputs(dict[str, torch.Tensor]):
    """What a step computes from, on the device: q1, q2 views of the queries, k1, k2 of the keys, and `back`.

    `back` [G] is where there are shuffled keys, and brings those of all processes into the order of the samples.
    """


class Step:
    """Trains on one batch when called. Nothing in it waits for the device.

    Only the embeddings that the objective needs are computed. Keys come first, for the whole batch; queries follow in
    `accumulate` parts, each of which meets the keys of the whole global batch. A step whose loss or gradients are not
    finite, on any process, leaves everything as it was: parameters, momentum encoder, statistics, queue, optimizer and
    schedules. The scale of fp16's losses alone then falls.

    graph: replay the step as one CUDA graph, once it has been taken a few times; measured steps are not.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        online: nn.Module,
        target: Encoder | None,
        queue: KeyQueue | None,
        objective: Objective,
        optimizer: Any,
        schedule: Schedule,
        *,
        accumulate: int = 1,
        clip: float = 0.0,
        gradient_shares: bool = False,
        graph: bool = False,
    ) -> None:
        self._accelerator, self._online, self._target = accelerator, online, target
        self.encoder: Encoder = accelerator.unwrap_model(online)
        """The online encoder, unwrapped."""
        self.schedule = schedule
        self._queue, self.objective, self._optimizer = queue, objective, optimizer
        self._accumulate, self._clip, self._shares = accumulate, clip, gradient_shares
        self.moving_average = MovingAverage(target, self.encoder) if target else None
        self.buffers = Buffers(*(module for module in (self.encoder, target) if module is not None))
        self._parameters = [p for p in self.encoder.parameters() if p.requires_grad]
        needs = objective.needs if target else {name.replace("k", "q").replace("K", "Q") for name in objective.needs}
        self._queries = sorted({int(name[1]) for name in needs if name[0] in "qQ"})
        self._keys = sorted({int(name[1]) for name in needs if name[0] in "kK"})
        self._everyone = sorted((name for name in objective.needs if name[0] in "QK"), reverse=True)  # Q before K
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr
        self._graph = Graph(self._take, accelerator.device, self._reset) if graph else None

    def __call__(self, batch: Batch, *, measured: bool = False) -> Result:
        """Train on `batch`.

        measured: also return the measures, which wait for the device. They cost a momentum forward pass where the first
        view's keys are not there or are shuffled, and change nothing.
        """
        inputs = self._inputs(batch)
        if measured:
            self.check()
        if self._graph is None or measured:
            return self._take(inputs, measured)
        return self._graph(inputs)

    def check(self) -> None:
        """Raise RuntimeError where parameters or buffers have been given other memory since the step was built."""
        self.buffers.check()
        if self.moving_average is not None:
            self.moving_average.check()

    def _inputs(self, batch: Batch) -> Inputs:
        views = {f"q{n}": batch.views[n - 1] for n in self._queries}
        views |= {f"k{n}": batch.shuffled.get(n - 1, batch.views[n - 1]) for n in self._keys}
        missing = [name for name, view in views.items() if view is None]
        assert not missing, f"the loader left out views that are needed: {missing}"
        inputs = Inputs({name: view for name, view in views.items() if view is not None})
        if batch.order is not None:
            inputs["back"] = to_device(np.argsort(batch.order), self._accelerator.device)
        return inputs

    def _take(self, inputs: Inputs, measured: bool = False) -> Result:
        """Take the step."""
        self.schedule.begin()
        kept = self.buffers.snapshot()
        keys, all_keys = self._encode_keys(inputs)
        enqueued = self._to_enqueue(keys, all_keys)
        results = []
        for part in range(self._accumulate):
            last = part == self._accumulate - 1
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._online):
                results.append(self._train_on(inputs, part, keys, all_keys, measured and last))
        taken = self._update()
        self.buffers.restore_unless(taken, kept)
        if self.moving_average is not None:
            self.moving_average.update(self.schedule.share * taken)
        if self._queue is not None:
            self._queue.write(enqueued(), taken)
        self.schedule.end(taken)
        parts = {name: torch.stack([r[0][name] for r in results]).mean() for name in results[0][0]}
        return Result(parts, results[-1][1], taken, results[-1][2])

    def _encode_keys(self, inputs: Inputs) -> tuple[Tensors, Tensors]:
        """Return this process's keys by name, k1 or k2 or both, [B, C], and those of all processes that are needed.

        Shuffled samples' keys come back to the processes whose samples they are (1911.05722, section 3.3).
        """
        if self._target is None:
            return {}, {}
        names = [f"k{number}" for number in self._keys]
        with torch.no_grad(), self._accelerator.autocast():
            parts = zip(*(inputs[name].chunk(self._accumulate) for name in names), strict=True)
            found = [self._target(*part) for part in parts]
        keys = {name: torch.cat(of) for name, of in zip(names, zip(*found, strict=True), strict=True)}
        if "back" not in inputs:
            return keys, {name: collectives.gather(keys[name.lower()]) for name in self._everyone if name[0] == "K"}
        everyone = {name.upper(): collectives.gather(k)[inputs["back"]] for name, k in keys.items()}
        return {
            name.lower(): k.chunk(collectives.world())[collectives.rank()] for name, k in everyone.items()
        }, everyone

    def _to_enqueue(self, keys: Tensors, all_keys: Tensors) -> Callable[[], torch.Tensor]:
        """Return what gives the keys of all processes that go into the queue, one a sample, [G, C].

        Where nothing needs them before, they are gathered while the queries are encoded.
        """
        if self._queue is None:
            return lambda: torch.empty(0)
        name = f"k{self.objective.base.pairs[0][1]}"
        return (lambda: all_keys[name.upper()]) if name.upper() in all_keys else collectives.gather_later(keys[name])

    def _train_on(
        self, inputs: Inputs, part: int, keys: Tensors, all_keys: Tensors, measured: bool
    ) -> tuple[Tensors, torch.Tensor, Tensors]:
        """Run forward and backward on a part of the batch; return what `Result` holds of it."""
        views = {n: inputs[f"q{n}"].chunk(self._accumulate)[part] for n in self._queries}
        named = dict(zip((f"q{n}" for n in self._queries), self._online(*views.values()), strict=True))
        named |= {name: k.chunk(self._accumulate)[part] for name, k in keys.items()}
        if self._target is None:
            named |= {f"k{n}": named[f"q{n}"] for n in self._queries}
        rows = len(named[f"q{self._queries[0]}"])
        first = (collectives.rank() * self._accumulate + part) * rows
        for name in self._everyone:
            named[name] = all_keys[name] if name in all_keys else self._gathered(named, name)
        e = Embeddings(named, None if self._queue is None else self._queue.keys, first)
        parts = self.objective(e)
        loss = total(parts)
        measures = self._measures(e, parts, views, "back" in inputs) if measured else {}
        # a loss that is not finite makes gradients of nan, and the sum over processes those of all
        share = torch.where(loss.detach().isfinite(), loss.new_full((), 1 / self._accumulate), torch.nan)
        self._accelerator.backward(loss * share)
        values = {"loss": loss.detach(), **{name: p.value.detach() for name, p in parts.items()}}
        return values, named[f"q{self._queries[0]}"].detach(), measures

    def _gathered(self, named: Tensors, name: str) -> torch.Tensor:
        """Return all processes' rows of a query, with gradient; once where SimCLR's queries serve as keys too."""
        query = f"Q{name[1]}"
        return named[query] if query in named else collectives.gather_with_gradient(named[query.lower()])

    def _update(self) -> torch.Tensor:
        """Take the optimizer's step where all gradients are finite; return whether, bool []. All processes agree."""
        optimizer, scaler = self._optimizer.optimizer, self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip:
            clip_grads_with_norm_(self._parameters, self._clip, norm)
        taken = norm.isfinite()
        optimizer.found_inf = (~taken).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()
        return taken

    def _reset(self) -> None:
        """Forget the gradients, scaled or not, of a step that was broken off."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler._per_optimizer_states.clear()

    def _measures(
        self, e: Embeddings, parts: dict[str, Part], views: dict[int, torch.Tensor], shuffled: bool
    ) -> Tensors:
        """Return the measures. The gap's key shares its query's batch statistics in every run: shuffled keys do not."""
        a, _ = self.objective.base.pairs[0]
        if self._target is not None and (shuffled or f"k{a}" not in e.named):
            kept = self.buffers.snapshot()
            with torch.no_grad(), self._accelerator.autocast():
                e = Embeddings({**e.named, f"k{a}": self._target(views[a])[0]}, e.queue, e.offset)
            self.buffers.restore(kept)
        found = embedding_metrics.measure(e, self.objective.base)
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
