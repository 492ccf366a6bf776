"""One training step: momentum encoder, online encoder, loss, backward, optimizer, moving average, queue."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from engine.config.settings import Settings
from engine.monitoring import embedding_metrics
from engine.monitoring.step_result import Result, Tensors
from engine.optim.schedule import Schedule
from engine.parallel import collectives
from engine.parallel.accelerator import DTYPES
from engine.parallel.gradients import Gradients
from engine.parallel.rendezvous import rank, world
from engine.training.cuda_graph import Graph
from engine.training.low_precision import LowPrecisionWeights
from methods import lockstep
from methods.base import Embeddings, Part, total
from methods.custom import is_custom
from methods.flat import Buffers
from methods.heads import Encoder
from methods.momentum import MovingAverage
from methods.norm import count_batches
from methods.queue import KeyQueue
from methods.registry import build_objective
from pipeline.loader import Batch
from pipeline.system.device import to_device


class Step:
    """Trains on a batch when called.

    No host-device synchronization: learning rate, queue pointer and the non-finite check stay on the GPU. A step whose
    loss or gradients are not finite, on any rank, changes nothing: parameters, momentum encoder, running statistics,
    queue, optimizer and schedules stay as they were; only fp16's loss scale falls.

    The queries may be computed in micro-batches, each against the keys of the global batch. After a few steps the step
    may be replayed as one CUDA graph; measured steps run without.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        online: nn.Module,
        target: Encoder | None,
        queue: KeyQueue | None,
        optimizer: Any,
        schedule: Schedule,
    ) -> None:
        self._settings, self._accelerator, self._online, self._target = settings, accelerator, online, target
        self._queue, self._optimizer, self.schedule = queue, optimizer, schedule
        self.encoder: Encoder = accelerator.unwrap_model(online)
        """The online encoder, unwrapped."""
        self.objective = objective = build_objective(settings.base, settings.terms)
        self._micro_batches = settings.micro_batches(world())
        self.moving_average = MovingAverage(target, self.encoder) if target else None
        self.buffers = Buffers(*(module for module in (self.encoder, target) if module is not None))
        self._parameters = [p for p in self.encoder.parameters() if p.requires_grad]
        # Weights that autocast would cast one by one; compiled code casts them within its kernels.
        dtype = DTYPES[accelerator.mixed_precision]
        # Other code may tie weights or compute layers in float32: autocast knows, copies of the weights would not.
        custom = is_custom(settings.model.arch)
        self._weights = [
            LowPrecisionWeights(module, dtype)
            for module in (self.encoder, target)
            if module is not None and dtype != torch.float32 and not settings.compile and not custom
        ]
        leaves = self._weights[0].leaves if self._weights else {}
        exchange = torch.bfloat16 if settings.gradient_dtype == "bfloat16" else None
        self._gradients = Gradients(self._parameters, leaves, exchange) if leaves or world() > 1 else None
        # The embeddings that the objective needs, and no others; without a momentum encoder queries serve as keys.
        needs = objective.needs if target else {name.replace("k", "q").replace("K", "Q") for name in objective.needs}
        self._queries = sorted({int(name[1]) for name in needs if name[0] in "qQ"})
        self._keys = sorted({int(name[1]) for name in needs if name[0] in "kK"})
        self._gathered = sorted((name for name in objective.needs if name[0] in "QK"), reverse=True)  # Q before K
        self._lockstep = (
            settings.model.bn == "sync"
            and world() > 1
            and target is not None
            and self._micro_batches == 1
            and not (settings.compile or settings.activation_checkpointing or custom)
            and self.encoder.one_pass
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr
        self._graph = Graph(self._train_step, accelerator.device, self._reset) if settings.cuda_graph else None

    def __call__(self, batch: Batch, *, measured: bool = False) -> Result:
        """Train on `batch`.

        measured: also return the measures, which wait for the device. They cost a momentum forward pass where the first
        view's keys are missing or shuffled, and change nothing.
        """
        inputs = self._inputs(batch)
        if measured:
            self.check()
        if self._graph is None or measured:
            return self._train_step(inputs, measured)
        return self._graph(inputs)

    def _train_step(self, inputs: Tensors, measured: bool = False) -> Result:
        # Learning rate and momentum m of this step: a table lookup on the device. A copy of the running statistics.
        self.schedule.begin()
        statistics = self.buffers.snapshot()
        self.encoder.kept_features = [] if self._settings.probe.every else None
        # Weights in low precision: one cast of all instead of one for each layer.
        for weights in self._weights:
            weights.update()

        # Where ranks share BatchNorm statistics, both encoders run layer by layer, for half the collectives.
        q, k = self._encode_in_lockstep(inputs) if self._lockstep else (None, None)
        # k = momentum encoder(x): one forward pass for all views, without gradient.
        keys, all_keys = self._encode_keys(inputs, k)
        # Start to gather the keys for the queue: one all-gather, overlapped with the queries.
        gathered = self._gather_for_queue(keys, all_keys)

        # q = encoder(x), loss and gradients, by micro-batches: most of the step's time. The gradients are averaged over
        # the ranks in a few all-reduces, during the last backward pass.
        results = []
        for index in range(self._micro_batches):
            last = index == self._micro_batches - 1
            results.append(self._forward_backward(inputs, index, q, keys, all_keys, measured and last))

        # Batches seen by each BatchNorm, in one operation for all layers.
        count_batches(self.encoder, self._micro_batches * self.encoder.passes(len(self._queries)))
        if self._target is not None:
            count_batches(self._target, self._micro_batches * self._target.passes(len(self._keys)))

        # Optimizer: a few kernels for all parameters; `taken` is false on every rank if any gradient is not finite.
        taken = self._update()
        # A skipped step restores the running statistics. The updates below are multiplied or masked by `taken`, which
        # stays on the device.
        self.buffers.restore_unless(taken, statistics)

        # params_k = m * params_k + (1 - m) * params_q: one in-place lerp over all parameters.
        if self.moving_average is not None:
            self.moving_average.update(self.schedule.ema_weight * taken)
        # queue[pointer : pointer + G] = keys of all ranks: in place, after the backward pass that read the queue.
        if self._queue is not None:
            self._queue.write(gathered(), taken)
        # Count the step as taken or skipped; the schedules follow the steps taken.
        self.schedule.end(taken)

        # The loss and its parts, as means over the micro-batches, in one tensor.
        parts, q, measures = results[-1]
        if len(results) > 1:
            parts = {name: torch.stack([values[name] for values, _, _ in results]).mean() for name in parts}
        result = Result.stack(parts, q, taken, measures)
        if self.encoder.kept_features:
            # [M V B, F], micro-batch by micro-batch and view by view: those of the first view.
            features, self.encoder.kept_features = torch.cat(self.encoder.kept_features), None
            result.features = features.unflatten(0, (len(results), len(self._queries), -1))[:, 0].flatten(0, 1)
        return result

    def _inputs(self, batch: Batch) -> Tensors:
        """Return the tensors that a step reads, on the device: views q1, q2 of the queries, k1, k2 of the keys.

        For shuffled keys also `unshuffle` [G], which brings those of all ranks into the order of the samples.
        """
        views = {f"q{n}": batch.views[n - 1] for n in self._queries}
        views |= {f"k{n}": batch.shuffled.get(n - 1, batch.views[n - 1]) for n in self._keys}
        inputs = {name: view for name, view in views.items() if view is not None}
        assert inputs.keys() == views.keys(), f"the loader left out needed views: {views.keys() - inputs.keys()}"
        if batch.order is not None:
            inputs["unshuffle"] = to_device(np.argsort(batch.order), self._accelerator.device)
        return inputs

    def _encode_in_lockstep(self, inputs: Tensors) -> list[Any]:
        """Return the embeddings of the queries' views and of the keys' views, [B, C] each."""
        assert self._target is not None
        queries, keys = [inputs[f"q{n}"] for n in self._queries], [inputs[f"k{n}"] for n in self._keys]
        with self._accelerator.autocast(), self._low_precision(0), self._low_precision(-1):
            passes = [lockstep.forward(self.encoder, *queries), lockstep.forward(self._target, *keys)]
            return lockstep.in_lockstep(passes, collectives.gather, gradients=(True, False))

    def _encode_keys(self, inputs: Tensors, encoded: Any = None) -> tuple[Tensors, Tensors]:
        """Return this rank's keys by name, k1 or k2 or both, [B, C], and the needed keys of all ranks, K1, K2 [G, C].

        encoded: the embeddings, where they have been computed.
        Shuffled keys return to the ranks of their samples (1911.05722, section 3.3).
        """
        if self._target is None:
            return {}, {}
        names = [f"k{n}" for n in self._keys]
        with torch.no_grad(), self._accelerator.autocast(), self._low_precision(-1):
            batches = zip(*(inputs[name].chunk(self._micro_batches) for name in names), strict=True)
            results = [self._target(*views) for views in batches] if encoded is None else [encoded]
        keys = {name: torch.cat(rows) for name, rows in zip(names, zip(*results, strict=True), strict=True)}
        if "unshuffle" not in inputs:
            return keys, {name: collectives.gather(keys[name.lower()]) for name in self._gathered if name[0] == "K"}
        all_keys = {name.upper(): collectives.gather(k)[inputs["unshuffle"]] for name, k in keys.items()}
        return {name.lower(): k.chunk(world())[rank()] for name, k in all_keys.items()}, all_keys

    def _gather_for_queue(self, keys: Tensors, all_keys: Tensors) -> Callable[[], torch.Tensor]:
        """Return a function that returns the keys of all ranks for the queue, one for each sample, [G, C]."""
        if self._queue is None:
            return lambda: torch.empty(0)
        name = f"k{self.objective.base.pairs[0][1]}"
        return (lambda: all_keys[name.upper()]) if name.upper() in all_keys else collectives.gather_later(keys[name])

    def _forward_backward(
        self, inputs: Tensors, index: int, encoded: Any, keys: Tensors, all_keys: Tensors, measured: bool
    ) -> tuple[Tensors, torch.Tensor, Tensors]:
        """Compute a micro-batch of queries, loss and gradients; return loss parts, online embeddings and measures.

        encoded: the queries' embeddings, where they have been computed.
        """
        # Queries of this micro-batch, [B, C], with the keys of the same samples.
        views = {n: inputs[f"q{n}"].chunk(self._micro_batches)[index] for n in self._queries}
        with self._low_precision(0):
            q = self._online(*views.values()) if encoded is None else encoded
        embeddings = dict(zip((f"q{n}" for n in self._queries), q, strict=True))
        embeddings |= {name: k.chunk(self._micro_batches)[index] for name, k in keys.items()}
        if self._target is None:
            embeddings |= {f"k{n}": embeddings[f"q{n}"] for n in self._queries}

        # Embeddings of all ranks, [G, C], in which this micro-batch begins at row `offset`.
        rows = len(embeddings[f"q{self._queries[0]}"])
        offset = (rank() * self._micro_batches + index) * rows
        for name in self._gathered:
            embeddings[name] = all_keys[name] if name in all_keys else self._gather_queries(embeddings, name)

        # Loss: the base method's own and its terms.
        e = Embeddings(embeddings, None if self._queue is None else self._queue.keys, offset)
        parts = self.objective(e)
        loss = total(parts)
        measures = self._measures(e, parts, views, "unshuffle" in inputs) if measured else {}

        # A non-finite loss becomes NaN gradients, and the all-reduce makes them NaN on every rank.
        factor = torch.where(loss.detach().isfinite(), loss.new_full((), 1 / self._micro_batches), torch.nan)
        if self._gradients is not None:
            self._gradients.begin(first=index == 0, last=index == self._micro_batches - 1)
        with self._low_precision(0):  # for activations that are computed again
            self._accelerator.backward(loss * factor)
        if self._gradients is not None:
            self._gradients.finish()
        values = {"loss": loss.detach(), **{name: p.value.detach() for name, p in parts.items()}}
        return values, embeddings[f"q{self._queries[0]}"].detach(), measures

    def _low_precision(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Return a context in which an encoder, 0 online, -1 momentum, has its weights in low precision."""
        return self._weights[index].applied() if self._weights else contextlib.nullcontext()

    def _gather_queries(self, embeddings: Tensors, name: str) -> torch.Tensor:
        """Return all ranks' queries, with gradient; gathered once where SimCLR's queries serve as keys too."""
        query = f"Q{name[1]}"
        return embeddings[query] if query in embeddings else collectives.gather_with_gradient(embeddings[query.lower()])

    def _update(self) -> torch.Tensor:
        """Take the optimizer's step unless a gradient is not finite; return whether, bool [], alike on all ranks."""
        optimizer, scaler = self._optimizer.optimizer, self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients if self._gradients is None else [self._gradients.flat])
        if clip := self._settings.optim.clip_grad_norm:
            clip_grads_with_norm_(self._parameters, clip, norm)
        taken = norm.isfinite()
        optimizer.found_inf = (~taken).float()  # fused SGD and AdamW, and our LARS, then change nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()
        return taken

    def check(self) -> None:
        """Raise RuntimeError where parameters or buffers were given other memory after the step was built."""
        self.buffers.check()
        if self.moving_average is not None:
            self.moving_average.check()

    def _reset(self) -> None:
        """Discard the gradients, scaled or not, of an interrupted step."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._gradients is not None:
            self._gradients.discard()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler._per_optimizer_states.clear()

    def _measures(
        self, e: Embeddings, parts: dict[str, Part], views: dict[int, torch.Tensor], shuffled: bool
    ) -> Tensors:
        """Return the measures; the gap's key shares its query's batch statistics, unlike shuffled keys."""
        a, _ = self.objective.base.pairs[0]
        if self._target is not None and (shuffled or f"k{a}" not in e.named):
            statistics = self.buffers.snapshot()
            with torch.no_grad(), self._accelerator.autocast():
                e = Embeddings({**e.named, f"k{a}": self._target(views[a])[0]}, e.queue, e.offset)
            self.buffers.restore(statistics)
        measures = embedding_metrics.measure(e, self.objective.base)
        return measures | (self._gradient_shares(e, parts) if self._settings.gradient_shares else {})

    def _gradient_shares(self, e: Embeddings, parts: dict[str, Part]) -> Tensors:
        """Return each weighted part's gradient norm at the online embeddings, as a share of the sum of these."""
        queries = [e[f"q{n}"] for n in self._queries]
        norms = []
        for part in parts.values():
            loss = part.weight * part.value
            gradients = torch.autograd.grad(loss, queries, retain_graph=True, allow_unused=True)
            norms.append(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        total_norm = torch.stack(norms).sum()
        return {f"gradient_share_{name}": norm / total_norm for name, norm in zip(parts, norms, strict=True)}
