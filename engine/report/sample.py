"""What an encoder takes for alike: the nearest neighbors of a few images among a sample of a data set."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from engine.evaluate.nearest_neighbors import neighbors
from engine.evaluate.online_knn import features
from engine.report.plotting import uri
from engine.weights.load import Loaded
from methods.encoders import place
from pipeline.backends.select_backend import choose
from pipeline.beton import Beton
from pipeline.storage.decode import decode
from pipeline.storage.subset import Subset
from pipeline.system.cores import available_cores
from pipeline.system.text import printable

SHOWN = 8
"""Images whose neighbors are shown."""
_OF_A_CLASS, _CLASSES = 50, 10  # images of a class in the sample, where the data have as many, and classes, at least
_SIDE, _SMALL = 112, 64  # pixels of a picture, at most; up to the smaller one it is stored without loss


@dataclass
class Sample:
    """Images of a data set, the same for every encoder."""

    beton: Beton
    ids: np.ndarray
    """int64 [n], ascending."""
    labels: np.ndarray
    """int64 [n]; all -1 where the data have none."""
    share: float
    """Side of the center crop over the shorter side."""
    seed: int
    pictures: dict[int, str] = field(default_factory=dict)

    @cached_property
    def queries(self) -> np.ndarray:
        """Places in `ids` of the images whose neighbors are shown, of as many classes as can be: int64 [q]."""
        order = np.random.default_rng(self.seed).permutation(len(self.ids))
        met: Counter[int] = Counter()
        rounds = []
        for label in self.labels[order].tolist():
            rounds.append(met[label])
            met[label] += 1
        return order[np.argsort(rounds, kind="stable")][:SHOWN]

    def only(self, kept: np.ndarray) -> Sample:
        """Return the images of which `kept`, bool [n], is true."""
        return Sample(self.beton, self.ids[kept], self.labels[kept], self.share, self.seed)

    @property
    def labeled(self) -> bool:
        """Whether the images have labels."""
        return bool((self.labels >= 0).all())

    @property
    def classes(self) -> int:
        """Number of classes in the sample."""
        return len(np.unique(self.labels))

    def name(self, place: int) -> str:
        """Return the class of an image, empty where it has none."""
        label = int(self.labels[place])
        if label < 0:
            return ""
        return printable(self.beton.classes[label]) if label < len(self.beton.classes) else f"class {label}"

    def picture(self, place: int) -> str:
        """Return an image's center crop as a data URI."""
        if place not in self.pictures:
            pixels = decode(self.beton, int(self.ids[place]))
            self.pictures[place] = _as_uri(_crop(Image.fromarray(pixels), self.share))
        return self.pictures[place]


def sample(beton: Beton, limit: int, share: float, seed: int) -> Sample:
    """Return at most `limit` images of a data set, the same for the same seed.

    Of a labeled one as many classes, at least ten, as leave 50 images of each, or all that a class has.
    """
    random = np.random.default_rng(seed)
    readable = np.setdiff1d(np.arange(len(beton)), list(beton.unreadable))
    labels = beton.labels[readable]
    labeled = bool((labels >= 0).any())
    ids = np.concatenate(list(_chosen(labels, limit, random))) if labeled else random.permutation(len(labels))[:limit]
    ids = np.sort(readable[ids])
    labels = beton.labels[ids] if labeled else np.full(len(ids), -1)
    return Sample(beton, ids, labels, share, seed)


def _chosen(labels: np.ndarray, limit: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the samples taken of each class that is taken, the classes in random order."""
    classes = random.permutation(np.unique(labels[labels >= 0]))
    enough, left = min(_OF_A_CLASS, max(limit // _CLASSES, 1)), limit
    for number, label in enumerate(classes):
        each = max(left // (len(classes) - number), enough)  # what small classes leave goes to the others
        members = random.permutation(np.flatnonzero(labels == label))[: min(each, left)]
        left -= len(members)
        yield members


def embed(loaded: Loaded, of: Sample, share: float, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """Return an encoder's features of the sample, float32 [n, F] of norm 1, on the CPU, and which records are whole."""
    part, cores = Subset(of.beton, of.ids), available_cores()
    loading: dict[str, Any] = {"size": loaded.architecture.size, "batch": 128, "share": share, "device": device}
    loading |= {"backend": choose("auto", part, device, cores=cores).name, "workers": cores, "on_bad": "skip"}
    place(loaded.backbone, device)
    asked = np.arange(len(part))
    found, read = features(loaded.backbone, part, indices=asked, **loading)
    return found.cpu(), read == asked


class Near(NamedTuple):
    """Nearest neighbors of some images: cosines, descending, and places in the sample, [q, k] each."""

    cosines: np.ndarray
    places: np.ndarray


def nearest(found: torch.Tensor, queries: np.ndarray, k: int) -> Near:
    """Return the k nearest of each query, itself left out, by features [n, F] of norm 1; exact."""
    k = min(k, len(found) - 1)
    similarity, index = neighbors(found[queries], found, torch.arange(len(found)), k + 1)
    others = index != torch.from_numpy(queries)[:, None]
    others[others.all(dim=1), -1] = False  # a query that is not among its own nearest: copies of it are
    return Near(similarity[others].view(-1, k).numpy(), index[others].view(-1, k).numpy())


def agreement(found: torch.Tensor, labels: np.ndarray, k: int) -> float:
    """Return the share of all images' k nearest neighbors that are of the image's own class."""
    near = nearest(found, np.arange(len(found)), k).places
    return float((labels[near] == labels[:, None]).mean())


def by_chance(labels: np.ndarray) -> float:
    """Return the share of all pairs of images that are of one class."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _crop(image: Image.Image, share: float) -> Image.Image:
    """Return the center crop that the encoder sees, shrunk to what is shown."""
    side = max(1, round(share * min(image.size)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    shown = min(side, _SIDE)
    return image.resize((shown, shown), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _as_uri(image: Image.Image) -> str:
    """Return a picture as a data URI."""
    kind, options = ("PNG", {}) if image.width <= _SMALL else ("JPEG", {"quality": 88})
    out = io.BytesIO()
    image.save(out, kind, **options)
    return uri(out.getvalue(), kind.lower())
