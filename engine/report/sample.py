"""A sample of a data set, and the nearest neighbors of a few of its images by an encoder's features."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from typing_extensions import Self

from engine.evaluate.nearest_neighbors import neighbors
from engine.evaluate.online_knn import features
from engine.report.plotting import uri
from engine.weights.load import LoadedEncoder
from methods.encoders import place
from pipeline.backends.select_backend import choose
from pipeline.beton import Beton
from pipeline.storage.decode import decode
from pipeline.storage.subset import Subset
from pipeline.system.cores import available_cores
from pipeline.system.errors import printable

QUERIES = 8
"""Images whose neighbors are shown."""
_CLASS_IMAGES, _MIN_CLASSES = 50, 10  # images of a class, if it has as many, and number of classes
_MAX_SIDE, _LOSSLESS_SIDE = 112, 64  # pixels of a picture; up to the latter it is a PNG


@dataclass
class Sample:
    """Images of a data set, the same for every encoder."""

    beton: Beton
    ids: np.ndarray
    """int64 [n], ascending."""
    labels: np.ndarray
    """int64 [n]; all -1 for unlabeled data."""
    crop_ratio: float
    """Side of the center crop over the shorter side."""
    seed: int
    pictures: dict[int, str] = field(default_factory=dict)

    @cached_property
    def queries(self) -> np.ndarray:
        """Positions in `ids` of the images whose neighbors are shown, of as many classes as possible: int64 [q]."""
        order = np.random.default_rng(self.seed).permutation(len(self.ids))
        counts: Counter[int] = Counter()
        rounds = []  # for each image the number of images of its class before it
        for label in self.labels[order].tolist():
            rounds.append(counts[label])
            counts[label] += 1
        return order[np.argsort(rounds, kind="stable")][:QUERIES]

    def only(self, mask: np.ndarray) -> Self:
        """Return the images that a mask, bool [n], selects."""
        return type(self)(self.beton, self.ids[mask], self.labels[mask], self.crop_ratio, self.seed)

    @property
    def labeled(self) -> bool:
        """Whether the images have labels."""
        return bool((self.labels >= 0).all())

    @property
    def classes(self) -> int:
        """Number of classes in the sample."""
        return len(np.unique(self.labels))

    def name(self, position: int) -> str:
        """Return the class of an image, empty if it has none."""
        label = int(self.labels[position])
        return self.class_name(label) if label >= 0 else ""

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number as text."""
        return printable(self.beton.classes[label]) if label < len(self.beton.classes) else f"class {label}"

    def picture(self, position: int) -> str:
        """Return an image's center crop as a data URI."""
        if position not in self.pictures:
            pixels = decode(self.beton, int(self.ids[position]))
            self.pictures[position] = _as_uri(_crop(Image.fromarray(pixels), self.crop_ratio))
        return self.pictures[position]


def draw_sample(beton: Beton, limit: int, crop_ratio: float, seed: int) -> Sample:
    """Return at most `limit` images of a data set, drawn by seed.

    Of labeled data as many classes, at least ten, as leave 50 images for each, or all that a class has.
    """
    random = np.random.default_rng(seed)
    readable = np.setdiff1d(np.arange(len(beton)), list(beton.unreadable))
    labels = beton.labels[readable]
    labeled = bool((labels >= 0).any())
    ids = np.concatenate(list(_by_class(labels, limit, random))) if labeled else random.permutation(len(labels))[:limit]
    ids = np.sort(readable[ids])
    labels = beton.labels[ids] if labeled else np.full(len(ids), -1)
    return Sample(beton, ids, labels, crop_ratio, seed)


def _by_class(labels: np.ndarray, limit: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the images drawn from each class, the classes in random order."""
    classes = random.permutation(np.unique(labels[labels >= 0]))
    enough, left = min(_CLASS_IMAGES, max(limit // _MIN_CLASSES, 1)), limit
    for number, label in enumerate(classes):
        quota = max(left // (len(classes) - number), enough)  # others get the images that small classes lack
        members = random.permutation(np.flatnonzero(labels == label))[: min(quota, left)]
        left -= len(members)
        yield members


def embed(
    encoder: LoadedEncoder, sample: Sample, crop_ratio: float, device: torch.device
) -> tuple[torch.Tensor, np.ndarray]:
    """Return an encoder's features of the sample, float32 [n, F] of norm 1, on the CPU, and a mask of intact images."""
    part, cores = Subset(sample.beton, sample.ids), available_cores()
    options: dict[str, Any] = {"size": encoder.architecture.size, "batch": 128, "device": device}
    options |= {"crop_ratio": crop_ratio, "workers": cores, "on_bad": "skip", "statistics": encoder.statistics}
    options["backend"] = choose("auto", part, device, cores=cores).name
    place(encoder.backbone, device)
    indices = np.arange(len(part))
    rows, ids = features(encoder.backbone, part, indices=indices, **options)
    return rows.cpu(), ids == indices


class Neighbors(NamedTuple):
    """Nearest neighbors of some images: cosines, descending, and positions in the sample, [q, k] each."""

    cosines: np.ndarray
    positions: np.ndarray


def nearest(rows: torch.Tensor, queries: np.ndarray, k: int) -> Neighbors:
    """Return the k nearest neighbors of each query, itself excluded, by features [n, F] of norm 1; exact."""
    k = min(k, len(rows) - 1)
    similarity, index = neighbors(rows[queries], rows, torch.arange(len(rows)), k + 1)
    others = index != torch.from_numpy(queries)[:, None]
    others[others.all(dim=1), -1] = False  # copies of the query may displace it from its own nearest
    return Neighbors(similarity[others].view(-1, k).numpy(), index[others].view(-1, k).numpy())


def agreement(rows: torch.Tensor, labels: np.ndarray, k: int) -> float:
    """Return the fraction of all images' k nearest neighbors that are of the image's own class."""
    near = nearest(rows, np.arange(len(rows)), k).positions
    return float((labels[near] == labels[:, None]).mean())


def chance_agreement(labels: np.ndarray) -> float:
    """Return the fraction of all pairs of images that are of one class."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _crop(image: Image.Image, crop_ratio: float) -> Image.Image:
    """Return the encoder's center crop, reduced to the size of a picture."""
    side = max(1, round(crop_ratio * min(image.size)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = min(side, _MAX_SIDE)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _as_uri(image: Image.Image) -> str:
    """Return a picture as a data URI."""
    kind, options = ("PNG", {}) if image.width <= _LOSSLESS_SIDE else ("JPEG", {"quality": 88})
    out = io.BytesIO()
    image.save(out, kind, **options)
    return uri(out.getvalue(), kind.lower())
