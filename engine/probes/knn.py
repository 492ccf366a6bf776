"""Weighted k-nearest-neighbour classification of frozen features (1805.01978, section 3.4), exact."""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from engine import ranks
from engine.probes.bench import Bench
from engine.probes.scores import Scores, score
from pipeline.errors import InputError

KS, TEMPERATURES = (10, 20, 100, 200), (0.07, 0.1)
_PUBLISHED = (200, 0.07)  # what is called kNN accuracy since 1805.01978
_ELEMENTS = 1 << 28  # of a block of similarities: a GiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add kNN's own options."""
    parser.add_argument("--k", type=int, nargs="+", help=f"neighbours (default: {' '.join(map(str, KS))})")
    parser.add_argument("--temperature", type=float, nargs="+", default=TEMPERATURES, metavar="T", help="of the votes")


def run(bench: Bench) -> None:
    """Classify the test images by their neighbours among the training images, for each k and temperature."""
    ks = _ks(bench)
    sets = {}
    for name, beton in (("train", bench.train), ("test", bench.test)):
        bench.say(f"features of {beton.path} ({name})")
        found, ids = bench.features(beton)
        sets[name] = F.normalize(found, dim=1), bench.labels(beton)[ids]
    bank, known = sets["train"]
    queries, true = (bench.everywhere(part, bench.test) for part in sets["test"])
    similarity, near = neighbours(queries, bank, known, max(ks), merged=ranks.world() > 1)
    labels = true.cpu().numpy()
    table: dict[tuple[int, float], Scores] = {}
    for k in ks:
        for temperature in bench.args.temperature:
            ranked = vote(similarity[:, :k], near[:, :k], temperature, bench.classes)
            table[k, temperature] = score(ranked.cpu().numpy(), labels, bench.test.classes)
    bench.check_frozen()
    chosen = _PUBLISHED if _PUBLISHED in table else max(table)
    every = [{"k": k, "temperature": t, "top1": s.top1, "top5": s.top5} for (k, t), s in table.items()]
    for (k, temperature), scores in table.items():
        if bench.first:
            print(f"k {k:4d}  T {temperature:<5g} {scores}")
    what = f"kNN, k {chosen[0]}, T {chosen[1]:g}"
    bench.finish("knn", what, table[chosen], every=every, settings=bench.settings())


def _ks(bench: Bench) -> list[int]:
    available = len(bench.train)
    ks = sorted(set(bench.args.k or [k for k in KS if k <= available] or [available]))
    if ks[0] < 1 or ks[-1] > available:
        raise InputError(f"--k {ks[-1] if ks[0] >= 1 else ks[0]}: choose 1 to {available}, the training images")
    if min(bench.args.temperature) <= 0:
        raise InputError(f"--temperature {min(bench.args.temperature):g}: choose a number above 0, such as 0.07")
    return ks


def neighbours(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int, *, merged: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest cosines of queries [N, F] with bank [M, F], descending, and their labels: [N, k] each.

    All of norm 1. Computed in blocks of rows. merged: `bank` is this process's share of one, and `queries` the same on
    all: the nearest are those of all processes.
    """
    found = []
    for part in queries.split(max(1, _ELEMENTS // max(len(bank), 1))):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        near = labels[index]
        if merged:
            missing = k - similarity.shape[1]  # where this process's share is smaller than k
            both = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(near, (0, missing))
            similarity, near = (torch.cat(ranks.gather(one).chunk(ranks.world()), dim=1) for one in both)
            similarity, index = similarity.topk(k, dim=1)
            near = near.gather(1, index)
        found.append((similarity, near))
    return torch.cat([s for s, _ in found]), torch.cat([n for _, n in found])


def vote(similarity: torch.Tensor, near: torch.Tensor, temperature: float, classes: int) -> torch.Tensor:
    """Return the five classes of most votes, int64 [N, 5], -1 for those without any.

    similarity, near: cosines and classes of the neighbours, [N, k]. A neighbour's vote is exp(cosine / temperature); of
    equal sums the smaller class comes first.
    """
    found = []
    for cosines, of in zip(similarity.split(8192), near.split(8192), strict=True):
        votes = torch.zeros(len(of), classes, device=of.device, dtype=torch.float64)
        votes.scatter_add_(1, of, (cosines.double() / temperature).exp())
        most, ranked = votes.sort(dim=1, descending=True, stable=True)
        most, ranked = most[:, :5], ranked[:, :5].masked_fill(most[:, :5] == 0, -1)
        found.append(F.pad(ranked, (0, 5 - ranked.shape[1]), value=-1))
    return torch.cat(found)
