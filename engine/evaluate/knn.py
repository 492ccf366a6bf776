"""Weighted k-nearest-neighbor classification of frozen features (1805.01978, section 3.4), exact."""

from __future__ import annotations

import argparse

from torch.nn import functional as F

from engine.evaluate.accuracy import Scores, score
from engine.evaluate.classification import Bench
from engine.evaluate.nearest_neighbors import neighbors, vote
from engine.parallel import collectives
from pipeline.system.errors import InputError

KS, TEMPERATURES = (10, 20, 100, 200), (0.07, 0.1)
_PUBLISHED = (200, 0.07)  # what is called kNN accuracy since 1805.01978


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add kNN's own options."""
    parser.add_argument("--k", type=int, nargs="+", help=f"neighbors (default: {' '.join(map(str, KS))})")
    parser.add_argument("--temperature", type=float, nargs="+", default=TEMPERATURES, metavar="T", help="of the votes")


def run(bench: Bench) -> None:
    """Classify the test images by their neighbors among the training images, for each k and temperature."""
    ks = _ks(bench)
    sets = {}
    for name, beton in (("train", bench.train), ("test", bench.test)):
        bench.say(f"features of {beton.path} ({name})")
        found, ids = bench.features(beton)
        sets[name] = F.normalize(found, dim=1), bench.labels(beton)[ids]
    bank, known = sets["train"]
    queries, true = (bench.everywhere(part, bench.test) for part in sets["test"])
    similarity, near = neighbors(queries, bank, known, max(ks), merged=collectives.world() > 1)
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
