"""kNN accuracy of a backbone, during training."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from engine.evaluate.nearest_neighbors import classify
from engine.evaluate.splits import count_unseen_labels, held_out, refuse_other_classes, refuse_unlabeled
from engine.parallel import collectives
from pipeline.beton import Beton, count_classes
from pipeline.loader import CenterLoader
from pipeline.sampling.order import evenly


@torch.no_grad()
def features(
    backbone: nn.Module,
    beton: Beton,
    *,
    indices: np.ndarray,
    autocast: Any = contextlib.nullcontext,
    after: Callable[[], None] = lambda: None,
    **loader: Any,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return the backbone's features of the center crops of samples `indices`: float32 [N, F], norm 1, on the device.

    Also returns the ids of the records read, int64 [N], which differ from `indices` where damaged ones are skipped. The
    backbone is in evaluation mode for the duration.
    after: called after each batch; its exceptions end the pass. loader: `size`, `batch`, `device` and other options of
    `CenterLoader`.
    """
    was_training = backbone.training
    backbone.eval()
    images = CenterLoader(beton, indices=indices, **loader)
    try:
        rows, ids, done = None, indices.copy(), 0
        with autocast(), torch.compiler.set_stance("force_eager"):  # no compilation for one pass over other shapes
            for batch, batch_ids in images:
                part = F.normalize(backbone(batch).float().flatten(1), dim=1)
                rows = part.new_empty(len(indices), part.shape[1]) if rows is None else rows
                rows[done : done + len(part)] = part
                ids[done : done + len(part)] = batch_ids
                done += len(part)
                after()
            if rows is None:  # more ranks than images: an empty shard still needs the feature dimension
                blank = torch.zeros(1, 3, images.size, images.size, device=loader["device"])
                rows = backbone(blank).float().flatten(1)[:0]
    finally:
        images.close()
        backbone.train(was_training)
    return rows, ids


class Knn:
    """Top-1 of a backbone on a labeled beton, by neighbors from the training set.

    If both are the same file, every tenth image of a class is a query, and the others are the bank.
    limit: maximum number of neighbors in the bank, and then of queries; 0: all. Raises InputError if an image of either
    has no label, the two name different classes, or no query has a class of the bank.
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
            mask = held_out(train.labels)
            bank, queries = bank[~mask], bank[mask]
            self._test_ids = queries[evenly(len(queries), limit)]
        self._bank_ids = bank[evenly(len(bank), limit)]
        count_unseen_labels(train.labels[bank], test.labels[self._test_ids], test.path)
        self._k, self._temperature = k, temperature
        self.fingerprint = test.fingerprint
        """Fingerprint of the test images."""
        self.classes = count_classes(train, test)

    def top1(
        self, backbone: nn.Module, autocast: Any = contextlib.nullcontext, after: Callable[[], None] = lambda: None
    ) -> float:
        """Return the fraction of test images that the vote classifies correctly; see `scores`."""
        return self.scores(backbone, autocast, after)["knn_top1"]

    def scores(
        self,
        backbone: nn.Module,
        autocast: Any = contextlib.nullcontext,
        after: Callable[[], None] = lambda: None,
        **classifiers: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, float]:
        """Return the fraction of test images that the vote classifies correctly, `knn_top1`, and of each classifier.

        To be called by all ranks. after: called after each batch of images, equally often on all ranks; its exceptions
        end the evaluation. classifiers: by name, of features [N, F] of norm 1 to classes [N].
        """
        bank, bank_labels = self._features(backbone, self._train, self._bank_ids, autocast, after)
        local, local_labels = self._features(backbone, self._test, self._test_ids, autocast, after)
        counts = [len(shard) for shard in collectives.shares(self._test_ids)]
        queries, labels = (collectives.gather_uneven(rows, counts) for rows in (local, local_labels))
        options: dict[str, Any] = {"k": self._k, "temperature": self._temperature, "classes": self.classes}
        predicted = classify(queries, bank, bank_labels, sharded=collectives.world() > 1, **options)
        results = {"knn_top1": predicted} | {name: classified(queries) for name, classified in classifiers.items()}
        return {name: (result == labels).double().mean().item() for name, result in results.items()}

    def _features(
        self, backbone: nn.Module, beton: Beton, indices: np.ndarray, autocast: Any, after: Callable[[], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features and labels of this rank's shard."""
        shards, batch = collectives.shares(indices), self._loader["batch"]
        local, longest = shards[collectives.rank()], max(map(len, shards))
        rows, ids = features(backbone, beton, indices=local, autocast=autocast, after=after, **self._loader)
        for _ in range(-(-longest // batch) - -(-len(local) // batch)):  # other ranks have more batches
            after()
        return rows, torch.from_numpy(beton.labels[ids]).to(rows.device)


class RawPixels(nn.Module):
    """The identity as a backbone: a baseline of kNN on pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)
