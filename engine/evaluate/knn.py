"""Weighted k-nearest-neighbor classification of frozen features (1805.01978, section 3.4), exact."""

import argparse

from accelerate.logging import get_logger
from torch.nn import functional as F

from engine.config.settings import Knn
from engine.evaluate import classification
from engine.evaluate.accuracy import Accuracy, score
from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.nearest_neighbors import neighbors, vote
from engine.parallel import collectives
from pipeline.system.errors import InputError

logger = get_logger(__name__)

KS, TEMPERATURES = (10, 20, 100, 200), (0.07, 0.1)
_HEADLINE = (Knn().k, Knn().temperature)  # the values of the kNN during training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of kNN."""
    classification.add_arguments(parser)
    parser.add_argument("--k", type=int, nargs="+", help=f"neighbors (default: {' '.join(map(str, KS))})")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=TEMPERATURES, metavar="T", help="temperature of the votes"
    )


def run(args: argparse.Namespace) -> None:
    """Classify the test images by their neighbors among the training images, for each k and temperature."""
    evaluation = classification.build(args)
    ks = _ks(evaluation)
    shards = {}
    for name, beton in (("train", evaluation.train), ("test", evaluation.test)):
        logger.info("features of %s (%s)", beton.path, name)
        features, ids = evaluation.features(beton)
        shards[name] = F.normalize(features, dim=1), evaluation.labels(beton)[ids]
    bank, bank_labels = shards["train"]
    queries, query_labels = (evaluation.gather(rows, evaluation.test) for rows in shards["test"])
    similarity, nearest = neighbors(queries, bank, bank_labels, max(ks), sharded=collectives.world() > 1)
    labels = query_labels.cpu().numpy()
    table: dict[tuple[int, float], Accuracy] = {}
    for k in ks:
        for temperature in args.temperature:
            predicted = vote(similarity[:, :k], nearest[:, :k], temperature, evaluation.classes)
            table[k, temperature] = score(predicted.cpu().numpy(), labels, evaluation.test.classes)
    evaluation.check_frozen()
    k, temperature = _HEADLINE if _HEADLINE in table else max(table)
    if evaluation.is_main:
        for (row_k, row_temperature), scores in table.items():
            print(f"k {row_k:4d}  T {row_temperature:<5g} {scores}")
    every = [{"k": k, "temperature": t, "top1": s.top1, "top5": s.top5} for (k, t), s in table.items()]
    title = f"kNN, k {k}, T {temperature:g}"
    evaluation.write("knn", title, table[k, temperature], evaluation.settings(), every=every)


def _ks(evaluation: ClassificationEvaluation) -> list[int]:
    """Return the numbers of neighbors. Raises InputError for one, or a temperature, out of range."""
    args, available = evaluation.args, len(evaluation.train)
    ks = sorted(set(args.k or [k for k in KS if k <= available] or [available]))
    if ks[0] < 1 or ks[-1] > available:
        raise InputError(f"--k {ks[-1] if ks[0] >= 1 else ks[0]}: choose 1 to {available}, the training images")
    if min(args.temperature) <= 0:
        raise InputError(f"--temperature {min(args.temperature):g}: choose a number above 0, such as 0.07")
    return ks
