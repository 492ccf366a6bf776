"""Every loss as a slow loop over plain float64 numbers, written from the papers' formulas alone."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

Rows = list[list[float]]


def unit(*shape: int, seed: int) -> torch.Tensor:
    """Return random rows of norm 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(values: list[float], t: float) -> list[float]:
    weights = [math.exp(v / t) for v in values]
    return [w / sum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def info_nce(q: Rows, k: Rows, negatives: Rows, t: float) -> float:
    """1911.05722, equation 1."""
    losses = []
    for i in range(len(q)):
        positive = math.exp(dot(q[i], k[i]) / t)
        rest = sum(math.exp(dot(q[i], n) / t) for n in negatives)
        losses.append(-math.log(positive / (positive + rest)))
    return average(losses)


def in_batch(q: Rows, k: Rows, t: float) -> float:
    """2104.02057, equation 1: the positive is the own key, the negatives are the other samples' keys."""
    losses = []
    for i in range(len(q)):
        exponentials = [math.exp(dot(q[i], key) / t) for key in k]
        losses.append(-math.log(exponentials[i] / sum(exponentials)))
    return average(losses)


def nt_xent(z1: Rows, z2: Rows, t: float) -> float:
    """2002.05709, equation 1, over all 2 N views."""
    z = z1 + z2
    losses = []
    for i in range(len(z)):
        j = (i + len(z1)) % len(z)
        rest = sum(math.exp(dot(z[i], z[k]) / t) for k in range(len(z)) if k != i)
        losses.append(-math.log(math.exp(dot(z[i], z[j]) / t) / rest))
    return average(losses)


def byol(q: Rows, k: Rows) -> float:
    """2006.07733, equation 2: the squared distance of the normalized rows."""
    distances = []
    for a, b in zip(q, k, strict=True):
        length_a, length_b = math.sqrt(dot(a, a)), math.sqrt(dot(b, b))
        distances.append(sum((x / length_a - y / length_b) ** 2 for x, y in zip(a, b, strict=True)))
    return average(distances)


def without(rows: Rows, own: int) -> Rows:
    return [row for i, row in enumerate(rows) if i != own]


def co2(q: Rows, k: Rows, negatives: Rows, t: float, offset: int | None = None) -> float:
    """2010.02217: (KL(P || Q) + KL(Q || P)) / 2 over the similarities to the negatives."""
    losses = []
    for i in range(len(q)):
        others = negatives if offset is None else without(negatives, offset + i)
        query = softmax([dot(q[i], n) for n in others], t)
        key = softmax([dot(k[i], n) for n in others], t)
        losses.append(0.5 * kl(key, query) + 0.5 * kl(query, key))
    return average(losses)


def cross_mse(q: Rows, k: Rows) -> float:
    """2206.04676: the mean of (S_ij - S_ji)^2."""
    pairs = [(i, j) for i in range(len(q)) for j in range(len(q))]
    return average([(dot(q[i], k[j]) - dot(q[j], k[i])) ** 2 for i, j in pairs])


def cross_kl(q: Rows, k: Rows, t: float) -> float:
    """2206.04676, as a symmetric divergence between the rows of S and of its transpose."""
    losses = []
    for i in range(len(q)):
        s_ij = softmax([dot(q[i], k[j]) for j in range(len(q))], t)
        s_ji = softmax([dot(q[j], k[i]) for j in range(len(q))], t)
        losses.append(0.5 * kl(s_ij, s_ji) + 0.5 * kl(s_ji, s_ij))
    return average(losses)


def uniformity(q: Rows, negatives: Rows, t: float, offset: int | None = None) -> float:
    """2206.04676: KL(U || softmax of the similarities to the negatives)."""
    losses = []
    for i in range(len(q)):
        others = negatives if offset is None else without(negatives, offset + i)
        p = softmax([dot(q[i], n) for n in others], t)
        losses.append(kl([1 / len(p)] * len(p), p))
    return average(losses)


def residual(q: Rows, k: Rows) -> float:
    """2211.09861: 1 - cos(q, k)."""
    lengths = [math.sqrt(dot(a, a) * dot(b, b)) for a, b in zip(q, k, strict=True)]
    return average([1 - dot(a, b) / n for a, b, n in zip(q, k, lengths, strict=True)])


def dcl(q: Rows, k: Rows, negatives: Rows, t: float, offset: int | None = None, same_view: Rows | None = None) -> float:
    """2110.06848, equation 6: InfoNCE without the positive in the denominator. same_view: the query's view of all."""
    losses = []
    for i in range(len(q)):
        others = negatives if offset is None else without(negatives, offset + i)
        others = others + without(same_view or [], i)
        losses.append(-dot(q[i], k[i]) / t + math.log(sum(math.exp(dot(q[i], n) / t) for n in others)))
    return average(losses)
