"""Features in the plane, colored by class: principal components, then t-SNE (van der Maaten and Hinton, 2008)."""

from typing import Any

import numpy as np
import torch

from engine.report.plotting import Theme, style_of
from engine.report.sample import Sample

MIN_POINTS = 10
_MAX_POINTS, _MAX_CLASSES = 1000, 15
_COMPONENTS, _PERPLEXITY = 50, 30


def choose_points(sample: Sample) -> np.ndarray:
    """Return the positions of the images to draw, int64 [m]: of the most frequent classes, by the sample's seed."""
    order = np.random.default_rng(sample.seed).permutation(len(sample.ids))
    if sample.labeled:
        order = order[np.isin(sample.labels[order], frequent_labels(sample))]
    return np.sort(order[:_MAX_POINTS])


def frequent_labels(sample: Sample) -> list[int]:
    """Return the labels of the sample's most frequent classes, in descending order."""
    labels, counts = np.unique(sample.labels[sample.labels >= 0], return_counts=True)
    return labels[np.argsort(-counts, kind="stable")][:_MAX_CLASSES].tolist()


def project(features: torch.Tensor, seed: int) -> np.ndarray:
    """Return points in the plane, [m, 2], for features [m, F] of norm 1."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = features.double().numpy()
    components = PCA(min(_COMPONENTS, *values.shape), random_state=seed).fit_transform(values)
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(components)


def draw(points: np.ndarray, sample: Sample, positions: np.ndarray, theme: Theme, axes: Any) -> None:
    """Draw the images at `positions` in the sample, int64 [m], as `points`, [m, 2]."""
    for number, label in enumerate(frequent_labels(sample) or [-1]):
        members = sample.labels[positions] == label
        style = style_of(theme, number)
        name = sample.class_name(label) if members.any() and sample.labeled else ""
        axes.scatter(
            *points[members].T, s=16, color=style.color, marker=style.marker, alpha=0.75, linewidths=0, label=name
        )
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
