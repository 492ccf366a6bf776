"""One training step: online encoder, momentum encoder, loss, backward, optimiser, moving average, queue."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from engine import ranks
from methods import momentum
from methods.moco import MoCo, Parts
from methods.queue import KeyQueue
from pipeline.hashing import mix, stream
from pipeline.transfer import to_device

_KEY_SHUFFLE = 0x73687566  # keeps these random numbers apart from those of order and augmentation


class Step:
    """Trains on one batch when called. Nothing in it waits for the device (but fp16's check for an overflow).

    Only the embeddings that `method` needs are computed. A step whose gradients overflowed in fp16 leaves parameters,
    momentum encoder and queue as they were.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        online: nn.Module,
        target: nn.Module,
        queue: KeyQueue,
        method: MoCo,
        optimiser: Any,
        *,
        ema: float,
        accumulate: int = 1,
        shuffle_keys: bool = False,
        seed: int = 0,
    ) -> None:
        self._accelerator, self._online, self._target = accelerator, online, target
        self._queue, self._method, self._optimiser = queue, method, optimiser
        self._parameters: tuple[list, list] = list(target.parameters()), list(online.parameters())
        self._ema, self._accumulate = ema, accumulate
        self._shuffle_keys, self._seed = shuffle_keys, seed

    def __call__(self, views: tuple[torch.Tensor, ...], number: int) -> Parts:
        """Train step `number` of the run on views ([B, 3, S, S] each); return the loss's parts, without gradient."""
        parts: list[Parts] = []
        keys: list[torch.Tensor] = []
        chunks = list(zip(*(view.chunk(self._accumulate) for view in views), strict=True))
        for index, chunk in enumerate(chunks):
            last = index == len(chunks) - 1
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._online):
                part, key = self._forward_backward(chunk, number, len(chunks))
            parts.append(part)
            keys.append(key)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        if not self._optimiser.step_was_skipped:
            momentum.update(*self._parameters, self._ema)
            self._queue.write(ranks.gather(torch.cat(keys)))
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def _forward_backward(
        self, views: tuple[torch.Tensor, ...], number: int, chunks: int
    ) -> tuple[Parts, torch.Tensor]:
        embeddings = self._embed(views, number)
        parts = self._method(embeddings, self._queue.keys)
        self._accelerator.backward(torch.stack(list(parts.values())).sum() / chunks)
        return {name: value.detach() for name, value in parts.items()}, self._method.enqueued(embeddings)

    def _embed(self, views: tuple[torch.Tensor, ...], number: int) -> dict[str, torch.Tensor]:
        """Return the embeddings that the method needs, by name: q1, q2 online, k1, k2 momentum."""
        needs = sorted(self._method.needs)
        online = [name for name in needs if name[0] == "q"]
        target = [name for name in needs if name[0] == "k"]
        queries = self._online(*(views[int(name[1]) - 1] for name in online))
        with torch.no_grad(), self._accelerator.autocast():
            keys = self._encode_keys([views[int(name[1]) - 1] for name in target], number)
        return dict(zip(online + target, (*queries, *keys), strict=True))

    def _encode_keys(self, views: list[torch.Tensor], number: int) -> tuple[torch.Tensor, ...]:
        """Return the momentum encoder's embeddings; of shuffled samples where BatchNorm sees parts of the batch.

        So a key's batch statistics are not those of its query's part (1911.05722, section 3.3).
        """
        if not self._shuffle_keys:
            return self._target(*views)
        key = mix(mix(np.uint64(_KEY_SHUFFLE) ^ np.uint64(self._seed)) ^ np.uint64(number))
        order = np.argsort(stream(key, len(views[0])), kind="stable")
        there, back = (to_device(index, views[0].device) for index in (order, np.argsort(order)))
        return tuple(k[back] for k in self._target(*(view[there] for view in views)))
