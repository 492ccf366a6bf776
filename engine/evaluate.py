"""kNN evaluation of frozen features. As a command, `python -m engine.evaluate`: all that `engine.probes` has."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from engine import ranks
from pipeline.beton import Beton, count_classes
from pipeline.errors import InputError
from pipeline.loader import CentreLoader

HELD_OUT = 10
"""Of one file, every tenth image is for testing."""


@torch.no_grad()
def features(
    backbone: nn.Module,
    beton: Beton,
    *,
    indices: np.ndarray,
    autocast: Any = contextlib.nullcontext,
    **loader: Any,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return the backbone's features of samples `indices`, centre-cropped: float32 [N, F] of norm 1, on the device.

    And the ids, int64 [N], of the records they are of: others, where damaged ones are passed over. The backbone is in
    evaluation mode meanwhile. loader: `size`, `batch`, `device` and the rest of `CentreLoader`'s.
    """
    was_training = backbone.training
    backbone.eval()
    images = CentreLoader(beton, indices=indices, **loader)
    try:
        found, ids, done = None, indices.copy(), 0
        with autocast(), torch.compiler.set_stance("force_eager"):  # for one pass over other shapes
            for batch, read in images:
                part = F.normalize(backbone(batch).float().flatten(1), dim=1)
                found = part.new_empty(len(indices), part.shape[1]) if found is None else found
                found[done : done + len(part)] = part
                ids[done : done + len(part)] = read
                done += len(part)
            if found is None:  # a process more than there are images
                one = torch.zeros(1, 3, images.size, images.size, device=loader["device"])
                found = backbone(one).float().flatten(1)[:0]
    finally:
        images.close()
        backbone.train(was_training)
    return found, ids


def knn_predict(
    features: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    *,
    k: int,
    temperature: float,
    classes: int,
    chunk: int = 1024,
    merged: bool = False,
) -> torch.Tensor:
    """Return the class of each of `features` [N, F] by weighted vote of its k nearest in `bank` [M, F]: int64 [N].

    All of norm 1; labels int64 [M]. A neighbour's vote is exp(cosine / temperature) (1805.01978, section 3.4); of equal
    sums the smaller class wins. Computed `chunk` rows at a time. merged: `bank` is this process's share of one, and
    `features` the same on all: the nearest are those of all processes.
    """
    found = []
    for part in features.split(chunk):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [chunk, k]
        near = labels[index]
        if merged:
            similarity, near = _nearest_of_all(similarity, near, k)
        votes = torch.zeros(len(part), classes, device=part.device, dtype=torch.float64)
        votes.scatter_add_(1, near, (similarity.double() / temperature).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def _nearest_of_all(similarity: torch.Tensor, near: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most similar of all processes' candidates, [N, k], and their classes."""
    missing = k - similarity.shape[1]
    similarity, near = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(near, (0, missing))
    everyone = (
        torch.cat(ranks.gather(part).chunk(ranks.world()), dim=1) for part in (similarity, near)
    )  # [N, world k]
    similarity, near = everyone
    similarity, index = similarity.topk(k, dim=1)
    return similarity, near.gather(1, index)


class Knn:
    """Top-1 of a backbone on a labelled beton, by neighbours from the training set.

    Where both are the same file, every tenth image of a class is classified by the others. limit: neighbours, and in
    that case queries, at most; 0 for all.
    Raises InputError where one of the two has no labels, or they have no class in common.
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
        for beton in (train, test):
            if (beton.labels < 0).any():
                raise InputError(
                    f"{beton.path}: has images without a label, which kNN needs: prepare it from class folders"
                )
        if train.manifest and test.manifest and train.classes != test.classes:
            raise InputError(
                f"{test.path}: its {len(test.classes)} classes are not the {len(train.classes)} of {train.path}: "
                "prepare both from the same class folders"
            )
        self._train, self._test, self._loader = train, test, {"device": device, **loader}
        bank, self._test_ids = np.arange(len(train)), np.arange(len(test))
        if train.fingerprint == test.fingerprint:
            queries = held_out(train.labels)
            bank, self._test_ids = bank[~queries], _spread(bank[queries], limit)
        self._bank_ids = _spread(bank, limit)
        unseen(train.labels[bank], test.labels[self._test_ids], test.path)
        self._k, self._temperature = k, temperature
        self.fingerprint = test.fingerprint
        self.classes = count_classes(train, test)

    def top1(self, backbone: nn.Module, autocast: Any = contextlib.nullcontext) -> float:
        """Return the share of test images whose class the vote gets right. Called by all processes, which share it."""
        bank, known = self._features(backbone, self._train, self._bank_ids, autocast)
        own, classes = self._features(backbone, self._test, self._test_ids, autocast)
        counts = [len(part) for part in _shares(self._test_ids)]
        queries, labels = ranks.gather_uneven(own, counts), ranks.gather_uneven(classes, counts)
        settings: dict[str, Any] = {"k": self._k, "temperature": self._temperature, "classes": self.classes}
        predicted = knn_predict(queries, bank, known, merged=ranks.world() > 1, **settings)
        return (predicted == labels).double().mean().item()

    def _features(
        self, backbone: nn.Module, beton: Beton, indices: np.ndarray, autocast: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features and labels of this process's share."""
        own = _shares(indices)[ranks.rank()]
        found, ids = features(backbone, beton, indices=own, autocast=autocast, **self._loader)
        return found, torch.from_numpy(beton.labels[ids]).to(found.device)


def held_out(labels: np.ndarray) -> np.ndarray:
    """Return which images are for testing, bool [N]: every tenth, counted class by class."""
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[::HELD_OUT]] = True
    return chosen


def unseen(train: np.ndarray, test: np.ndarray, path: Path) -> int:
    """Return how many of the labels to test on are none of those to train on, [N] each.

    Raises InputError where all are: whatever comes of it, the result would be 0. path: of the test images.
    """
    count = int((~np.isin(test, train)).sum())
    if count == len(test):
        raise InputError(
            f"{path}: no image to test on is of a class with images to train on: give data of several images a class"
        )
    return count


def _spread(indices: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` of them, evenly spread, all for 0."""
    count = min(limit or len(indices), len(indices))
    return indices[np.arange(count) * len(indices) // max(count, 1)]


def _shares(indices: np.ndarray) -> list[np.ndarray]:
    """Return each process's share: runs of neighbours, as even as can be."""
    return np.array_split(indices, ranks.world())


class RawPixels(nn.Module):
    """The identity as a backbone: what kNN gets from pixels alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


if __name__ == "__main__":
    from engine.probes.command import main

    main()
