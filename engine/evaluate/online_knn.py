"""kNN evaluation of frozen features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from engine.evaluate.nearest_neighbors import classify
from engine.evaluate.splits import held_out, refuse_other_classes, refuse_unlabeled, unseen
from engine.parallel import collectives
from pipeline.beton import Beton, count_classes
from pipeline.loader import CenterLoader
from pipeline.sampling.order import evenly


def nothing() -> None:
    """Do nothing."""


@torch.no_grad()
def features(
    backbone: nn.Module,
    beton: Beton,
    *,
    indices: np.ndarray,
    autocast: Any = contextlib.nullcontext,
    after: Callable[[], None] = nothing,
    **loader: Any,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return the backbone's features of samples `indices`, center-cropped: float32 [N, F] of norm 1, on the device.

    And the ids, int64 [N], of the records they are of: others, where damaged ones are passed over. The backbone is in
    evaluation mode meanwhile. after: is called after each batch, and ends this by what it raises. loader: `size`,
    `batch`, `device` and the rest of `CenterLoader`'s.
    """
    was_training = backbone.training
    backbone.eval()
    images = CenterLoader(beton, indices=indices, **loader)
    try:
        found, ids, done = None, indices.copy(), 0
        with autocast(), torch.compiler.set_stance("force_eager"):  # for one pass over other shapes
            for batch, read in images:
                part = F.normalize(backbone(batch).float().flatten(1), dim=1)
                found = part.new_empty(len(indices), part.shape[1]) if found is None else found
                found[done : done + len(part)] = part
                ids[done : done + len(part)] = read
                done += len(part)
                after()
            if found is None:  # a process more than there are images
                one = torch.zeros(1, 3, images.size, images.size, device=loader["device"])
                found = backbone(one).float().flatten(1)[:0]
    finally:
        images.close()
        backbone.train(was_training)
    return found, ids


class Knn:
    """Top-1 of a backbone on a labeled beton, by neighbors from the training set.

    Where both are the same file, every tenth image of a class is classified by the others. limit: neighbors, and in
    that case queries, at most; 0 for all. Raises InputError where an image of either has no label, the two name
    different classes, or no image to classify has neighbors of its class.
    """

    def __init__(
        self,
        train: Beton,
        test: Beton,
        *,
        k: int,
        temperature: float,
        limit: int = 0,
        device: torch.device,
        **loader: Any,
    ) -> None:
        refuse_unlabeled(train, test)
        refuse_other_classes(train, test)
        self._train, self._test, self._loader = train, test, {"device": device, **loader}
        bank, self._test_ids = np.arange(len(train)), np.arange(len(test))
        if train.fingerprint == test.fingerprint:
            queries = held_out(train.labels)
            bank, own = bank[~queries], bank[queries]
            self._test_ids = own[evenly(len(own), limit)]
        self._bank_ids = bank[evenly(len(bank), limit)]
        unseen(train.labels[bank], test.labels[self._test_ids], test.path)
        self._k, self._temperature = k, temperature
        self.fingerprint = test.fingerprint
        self.classes = count_classes(train, test)

    def top1(
        self, backbone: nn.Module, autocast: Any = contextlib.nullcontext, after: Callable[[], None] = nothing
    ) -> float:
        """Return the share of test images whose class the vote gets right. Called by all processes, which share it.

        after: is called after each batch of images, on all processes equally often, and ends this by what it raises.
        """
        bank, known = self._features(backbone, self._train, self._bank_ids, autocast, after)
        own, classes = self._features(backbone, self._test, self._test_ids, autocast, after)
        counts = [len(part) for part in collectives.shares(self._test_ids)]
        queries, labels = collectives.gather_uneven(own, counts), collectives.gather_uneven(classes, counts)
        settings: dict[str, Any] = {"k": self._k, "temperature": self._temperature, "classes": self.classes}
        predicted = classify(queries, bank, known, merged=collectives.world() > 1, **settings)
        return (predicted == labels).double().mean().item()

    def _features(
        self, backbone: nn.Module, beton: Beton, indices: np.ndarray, autocast: Any, after: Callable[[], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features and labels of this process's share."""
        shares, batch = collectives.shares(indices), self._loader["batch"]
        own, most = shares[collectives.rank()], max(map(len, shares))
        found, ids = features(backbone, beton, indices=own, autocast=autocast, after=after, **self._loader)
        for _ in range(-(-most // batch) - -(-len(own) // batch)):  # batches that others have more
            after()
        return found, torch.from_numpy(beton.labels[ids]).to(found.device)


class RawPixels(nn.Module):
    """The identity as a backbone: what kNN gets from pixels alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)
