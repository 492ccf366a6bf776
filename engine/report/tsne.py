"""Features in the plane, colored by class: principal components, then t-SNE (van der Maaten and Hinton, 2008)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.report.plotting import Theme, picture, sheet, style_of
from engine.report.sample import Sample

POINTS, CLASSES = 1000, 15
"""Drawn at most."""
FEWEST = 10
_COMPONENTS, _PERPLEXITY = 50, 30


def shown(of: Sample) -> np.ndarray:
    """Return the places in the sample of the images to draw, int64 [m]: of the most frequent classes, by its seed."""
    order = np.random.default_rng(of.seed).permutation(len(of.ids))
    if of.labeled:
        order = order[np.isin(of.labels[order], frequent(of))]
    return np.sort(order[:POINTS])


def frequent(of: Sample) -> list[int]:
    """Return the labels of the sample's most frequent classes, the most frequent first."""
    labels, counts = np.unique(of.labels[of.labels >= 0], return_counts=True)
    return labels[np.argsort(-counts, kind="stable")][:CLASSES].tolist()


def project(found: torch.Tensor, seed: int) -> np.ndarray:
    """Return places in the plane, [m, 2], of features [m, F] of norm 1."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = found.double().numpy()
    components = PCA(min(_COMPONENTS, *values.shape), random_state=seed).fit_transform(values)
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(components)


def draw(places: np.ndarray, of: Sample, at: np.ndarray, theme: Theme, axes: Any) -> None:
    """Draw the images `at` (places in the sample, int64 [m]) at `places`, [m, 2]."""
    for number, label in enumerate(frequent(of) or [-1]):
        members = of.labels[at] == label
        look = style_of(theme, number)
        name = of.name(int(at[members][0])) if members.any() and of.labeled else ""
        axes.scatter(
            *places[members].T, s=16, color=look.color, marker=look.marker, alpha=0.75, linewidths=0, label=name
        )
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def alone(places: np.ndarray, of: Sample, at: np.ndarray, theme: Theme) -> bytes:
    """Return one encoder's map as a PNG, without title and legend."""
    return picture(partial(draw, places, of, at, theme), theme, (4.4, 3.8))


def together(maps: Sequence[tuple[str, np.ndarray]], of: Sample, at: np.ndarray, theme: Theme) -> bytes:
    """Return all encoders' maps as one PNG, with titles and a legend."""
    parts = [(name, partial(draw, places, of, at, theme)) for name, places in maps]
    return sheet(parts, theme, (3.9, 3.6))
