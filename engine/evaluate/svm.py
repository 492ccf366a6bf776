"""One-vs-all linear SVMs on frozen features of multi-label images, in PASCAL VOC's layout: mean average precision.

As VOC07 classification is done since 1905.01235 (section 4; facebookresearch/vissl's `svm` benchmark): features of norm
1, a squared hinge loss with positives counted twice, the cost of each class chosen by three-fold cross-validation,
images marked difficult (0) left out. Average precision is scikit-learn's, without interpolation.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch.nn import functional as F

from engine.evaluate.accuracy import bounds
from engine.evaluate.classification import Bench
from engine.parallel import collectives
from pipeline.beton import Beton
from pipeline.system.errors import InputError
from pipeline.system.limits import LIST_BYTES, read_text
from pipeline.system.text import printable

COSTS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
_LABELS = {"1": 1, "0": 0, "-1": -1}
_RESAMPLES = 500
_FOLDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of SVMs."""
    parser.add_argument("--sets", type=Path, required=True, metavar="FOLDER", help="VOC2007/ImageSets/Main, of --train")
    parser.add_argument("--test-sets", type=Path, metavar="FOLDER", help="that of --test (default: --sets)")
    parser.add_argument("--train-set", default="trainval", help="CLASS_trainval.txt there (default: trainval)")
    parser.add_argument("--test-set", default="test", help="CLASS_test.txt there (default: test)")
    parser.add_argument("--costs", type=float, nargs="+", default=COSTS, metavar="C", help="to choose from")


def run(bench: Bench) -> None:
    """Train an SVM a class, and score them by mean average precision."""
    args = bench.args
    if min(args.costs) <= 0:
        raise InputError(f"--costs {min(args.costs):g}: choose numbers above 0")
    names, train_labels, train_rows = multi_labels(args.sets, args.train_set, bench.train)
    test_names, test_labels, test_rows = multi_labels(args.test_sets or args.sets, args.test_set, bench.test)
    if names != test_names:
        raise InputError(f"{args.test_sets or args.sets}: its classes are not those of {args.sets}: give folders alike")
    for path, labels, fewest in ((bench.train.path, train_labels, _FOLDS), (bench.test.path, test_labels, 1)):
        few = [name for name, column in zip(names, labels.T, strict=True) if (column == 1).sum() < fewest]
        if few:
            raise InputError(f"{path}: fewer than {fewest} images of {', '.join(few[:4])}: give other sets")
    rows = {"train": train_rows, "test": test_rows}
    found, features, of = {}, np.zeros(0), ""
    for name, beton in (("train", bench.train), ("test", bench.test)):
        if beton.fingerprint != of:  # VOC's sets are usually parts of one
            features = F.normalize(bench.everywhere(bench.features(beton)[0], beton), dim=1).cpu().numpy()
            of = beton.fingerprint
        found[name] = features[rows[name]]
    bench.check_frozen()
    if collectives.rank() == 0:
        scores, costs = classify(bench, found["train"], train_labels, found["test"], args.costs)
        _tell(bench, names, test_labels, scores, costs)


def _tell(bench: Bench, names: list[str], labels: np.ndarray, scores: np.ndarray, costs: list[float]) -> None:
    precisions, interval = mean_precision(labels, scores, bench.args.seed)
    mean = float(np.mean(precisions))
    result = {
        "map": mean,
        "interval": interval,
        "per_class": dict(zip(names, precisions, strict=True)),
        "costs": dict(zip(names, costs, strict=True)),
        "images": len(labels),
        "settings": bench.settings(train_set=bench.args.train_set, test_set=bench.args.test_set),
    }
    shown = f"mAP {100 * mean:.2f} ({100 * interval[0]:.2f}-{100 * interval[1]:.2f}) over {len(names)} classes"
    bench.write("svm", result, "linear SVMs", f"{100 * mean:.2f}", shown)


def multi_labels(folder: Path, which: str, beton: Beton) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return class names, labels int8 [N, C] (1, -1, or 0: difficult) and samples int64 [N] of a set of images.

    folder: of files CLASS_WHICH.txt with lines `IMAGE LABEL`. Raises InputError where there are none, they do not agree
    on the images, or an image is not in the data.
    """
    files = sorted(path for path in folder.glob(f"*_{which}.txt"))
    if not files:
        raise InputError(f"{folder}: no files CLASS_{which}.txt: give VOC's ImageSets/Main")
    columns: list[dict[str, int]] = []
    for file in files:
        lines = [line.split() for line in read_text(file, LIST_BYTES, "fetch it again").splitlines() if line.strip()]
        try:
            columns.append({printable(name): _LABELS[label] for name, label in lines})
        except (KeyError, ValueError) as error:
            raise InputError(f"{file}: not lines of an image and 1, 0 or -1 ({error}): fetch it again") from None
        if columns[-1].keys() != columns[0].keys():
            raise InputError(f"{file}: not of the same images as {files[0].name}: fetch both again")
    where = {PurePosixPath(beton.name(index)).stem: index for index in range(len(beton))}
    images = list(columns[0])
    missing = [name for name in images if name not in where]
    if missing or not images:
        raise InputError(f"{files[0]}: {len(missing)} of {len(images)} images are not in {beton.path}: {missing[:3]}")
    labels = np.array([[column[name] for column in columns] for name in images], np.int8)
    return [file.name.removesuffix(f"_{which}.txt") for file in files], labels, np.array([where[n] for n in images])


def classify(
    bench: Bench, train: np.ndarray, labels: np.ndarray, test: np.ndarray, costs: tuple[float, ...]
) -> tuple[np.ndarray, list[float]]:
    """Return decision values float64 [N, C] of test features [N, F], and the cost chosen for each class."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    scores, chosen = np.zeros((len(test), labels.shape[1])), []
    for column in bench.shown(range(labels.shape[1]), "classes"):
        known = labels[:, column] != 0
        machine = LinearSVC(class_weight={1: 2, -1: 1}, max_iter=2000, random_state=bench.args.seed)
        search: Any = GridSearchCV(machine, {"C": list(costs)}, scoring="average_precision", cv=_FOLDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of costs too large to be chosen
            search.fit(train[known], labels[known, column])
        scores[:, column] = search.decision_function(test)
        chosen.append(float(search.best_params_["C"]))
    return scores, chosen


def mean_precision(labels: np.ndarray, scores: np.ndarray, seed: int) -> tuple[list[float], tuple[float, float]]:
    """Return each class's average precision, and the bootstrap's 95 % interval of their mean, images drawn anew."""
    precisions = [_precision(labels[:, c], scores[:, c]) for c in range(labels.shape[1])]
    random = np.random.default_rng(seed)
    means = []
    for _ in range(_RESAMPLES):
        rows = random.integers(len(labels), size=len(labels))
        drawn = [_precision(labels[rows, c], scores[rows, c]) for c in range(labels.shape[1])]
        means.append(np.nanmean(drawn))
    return precisions, bounds(np.array(means))


def _precision(labels: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score

    known = labels != 0
    if not (labels[known] == 1).any():
        return float("nan")
    return float(average_precision_score(labels[known] == 1, scores[known]))
