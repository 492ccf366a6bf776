"""One-vs-all linear SVMs on frozen features of multi-label images, in PASCAL VOC's layout: mean average precision.

VOC07 classification as in 1905.01235 (section 4; facebookresearch/vissl's `svm` benchmark): features of norm 1, a
squared hinge loss with positives weighted by 2, the cost of each class chosen by three-fold cross-validation, images
marked difficult (0) left out. Average precision is scikit-learn's, without interpolation.
"""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch.nn import functional as F

from engine.evaluate import classification
from engine.evaluate.accuracy import Interval, Scores, percent, percentile_interval
from engine.evaluate.classification import ClassificationEvaluation
from pipeline.beton import Beton
from pipeline.system.errors import InputError
from pipeline.system.limits import LIST_BYTES, read_text
from pipeline.system.text import printable

COSTS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
_LABELS = {"1": 1, "0": 0, "-1": -1}
_RESAMPLES = 500
_FOLDS = 3


@dataclass
class MeanPrecision(Scores):
    """Scores of SVMs."""

    MAIN = "map"
    map: float
    """Mean average precision."""
    interval: Interval
    """95 % interval of the mean, by bootstrap over the test images."""
    per_class: dict[str, float]
    costs: dict[str, float]
    """Chosen for each class."""
    images: int

    def __str__(self) -> str:
        return f"mAP {100 * self.map:.2f} ({percent(self.interval)}) over {len(self.per_class)} classes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of SVMs."""
    classification.add_arguments(parser)
    parser.add_argument("--sets", type=Path, required=True, metavar="FOLDER", help="VOC2007/ImageSets/Main of --train")
    parser.add_argument("--test-sets", type=Path, metavar="FOLDER", help="that of --test (default: --sets)")
    parser.add_argument("--train-set", default="trainval", help="reads CLASS_trainval.txt (default: trainval)")
    parser.add_argument("--test-set", default="test", help="reads CLASS_test.txt (default: test)")
    parser.add_argument("--costs", type=float, nargs="+", default=COSTS, metavar="C", help="candidates")


def run(args: argparse.Namespace) -> None:
    """Train an SVM for each class, and score them by mean average precision."""
    evaluation = classification.build(args, labeled=False)
    train, test = evaluation.train, evaluation.test
    if min(args.costs) <= 0:
        raise InputError(f"--costs {min(args.costs):g}: choose numbers above 0")
    test_sets = args.test_sets or args.sets
    names, train_labels, train_rows = read_multi_labels(args.sets, args.train_set, train)
    test_names, test_labels, test_rows = read_multi_labels(test_sets, args.test_set, test)
    if names != test_names:
        raise InputError(f"{test_sets}: its classes are not those of {args.sets}: give folders of the same classes")
    for path, labels, fewest in ((train.path, train_labels, _FOLDS), (test.path, test_labels, 1)):
        rare = [name for name, column in zip(names, labels.T, strict=True) if (column == 1).sum() < fewest]
        if rare:
            raise InputError(f"{path}: fewer than {fewest} images of {', '.join(rare[:4])}: give other sets")
    features = _features(evaluation, train)
    # VOC's sets are usually of the same images.
    test_features = features if test.fingerprint == train.fingerprint else _features(evaluation, test)
    evaluation.check_frozen()
    if evaluation.is_main:
        train_features, test_features = features[train_rows], test_features[test_rows]
        values, costs = train_svms(evaluation, train_features, train_labels, test_features)
        scores = score(names, test_labels, values, costs, args.seed)
        settings = evaluation.settings(train_set=args.train_set, test_set=args.test_set)
        evaluation.write("svm", "linear SVMs", scores, settings)


def _features(evaluation: ClassificationEvaluation, beton: Beton) -> np.ndarray:
    """Return features of norm 1 of all images, float32 [N, F]."""
    return F.normalize(evaluation.gather(evaluation.features(beton)[0], beton), dim=1).cpu().numpy()


def read_multi_labels(folder: Path, which: str, beton: Beton) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return class names, labels int8 [N, C] (1, -1, or 0: difficult) and samples int64 [N] of a set of images.

    folder: contains files CLASS_WHICH.txt of lines `IMAGE LABEL`. Raises InputError if there are none, they list
    different images, or the beton lacks an image.
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
    samples = {PurePosixPath(beton.name(index)).stem: index for index in range(len(beton))}
    images = list(columns[0])
    missing = [name for name in images if name not in samples]
    if missing or not images:
        raise InputError(f"{files[0]}: {len(missing)} of {len(images)} images are not in {beton.path}: {missing[:3]}")
    labels = np.array([[column[name] for column in columns] for name in images], np.int8)
    names = [file.name.removesuffix(f"_{which}.txt") for file in files]
    return names, labels, np.array([samples[name] for name in images])


def train_svms(
    evaluation: ClassificationEvaluation, train: np.ndarray, labels: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """Return decision values float64 [N, C] of test features [N, F], and the cost chosen for each class."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    values, chosen = np.zeros((len(test), labels.shape[1])), []
    for column in evaluation.progress(range(labels.shape[1]), "classes"):
        known = labels[:, column] != 0
        svm = LinearSVC(class_weight={1: 2, -1: 1}, max_iter=2000, random_state=evaluation.args.seed)
        search: Any = GridSearchCV(svm, {"C": list(evaluation.args.costs)}, scoring="average_precision", cv=_FOLDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # raised at costs too large to be chosen
            search.fit(train[known], labels[known, column])
        values[:, column] = search.decision_function(test)
        chosen.append(float(search.best_params_["C"]))
    return values, chosen


def score(names: list[str], labels: np.ndarray, values: np.ndarray, costs: list[float], seed: int) -> MeanPrecision:
    """Return the scores of decision values [N, C] for labels [N, C]. seed: of the bootstrap."""
    precisions = [_average_precision(labels[:, c], values[:, c]) for c in range(labels.shape[1])]
    random = np.random.default_rng(seed)
    means = []
    for _ in range(_RESAMPLES):
        rows = random.integers(len(labels), size=len(labels))
        means.append(np.nanmean([_average_precision(labels[rows, c], values[rows, c]) for c in range(labels.shape[1])]))
    by_class, chosen = (dict(zip(names, column, strict=True)) for column in (precisions, costs))
    mean, interval = float(np.mean(precisions)), percentile_interval(np.array(means))
    return MeanPrecision(mean, interval, by_class, chosen, len(labels))


def _average_precision(labels: np.ndarray, values: np.ndarray) -> float:
    """Return the average precision of a class, without difficult images; NaN without positives."""
    from sklearn.metrics import average_precision_score

    known = labels != 0
    if not (labels[known] == 1).any():
        return float("nan")
    return float(average_precision_score(labels[known] == 1, values[known]))
