"""A linear classifier on features computed once, in bfloat16 on the device, with a sweep of rate and decay.

Each feature is standardized over the training images, so that one range of rates suits all encoders; the classifier
stays linear. All pairs of rate and decay are trained in parallel, as one matrix product, on nine tenths of (at most
`--sweep-images`) training images, and compared on the remaining tenth, never on the test images. The best pair is then
trained on all training images. Ranks divide the pairs among them.

Features are cached in OUT/linear_fast, 2 F bytes for an image and pass. The same command reads them, after an
interruption or with another rate, number of epochs or of passes; the steps after them run again.
"""

import argparse
import contextlib
import itertools
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.nn import functional as F

from engine.checkpoint.storage import Tensors
from engine.evaluate.classification import ClassificationEvaluation, top5
from engine.evaluate.resume import load_cached, read_on_first, save_cached, valid_ids
from engine.evaluate.trainer import check_batch
from engine.parallel import collectives
from pipeline.system.device import to_device
from pipeline.system.errors import InputError, describe_error

logger = get_logger(__name__)

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
_BATCH, _EPOCHS = 1024, 50
_VALIDATION = 10  # every tenth image of the sweep is for validation
_EPSILON = 1e-6
_BLOCK_ROWS = 65536
Pass = tuple[torch.Tensor, torch.Tensor]
"""Features bfloat16 [n, F] of a pass over the training images, and ids or labels, int64 [n]."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of protocol fast."""
    group = parser.add_argument_group("protocol fast")
    group.add_argument("--passes", type=int, default=1, help="augmented passes cached; 0: center crops (default: 1)")
    group.add_argument("--sweep-images", type=int, default=100_000, help="most images in the sweep (default: 100000)")


def run(evaluation: ClassificationEvaluation) -> None:
    """Compute features, sweep rate and decay, train the best pair on all images, and score it on the test images."""
    args = evaluation.args
    if not 0 <= args.passes <= 100 or args.sweep_images < 2 * _VALIDATION:
        raise InputError(f"--passes {args.passes} --sweep-images {args.sweep_images}: choose 0 to 100, and 20 or more")
    epochs = int(args.epochs or _EPOCHS)
    passes = training_features(evaluation)
    mean, deviation = _statistics(passes)
    passes = [(_standardize(x, mean, deviation), y) for x, y in passes]
    pairs = list(itertools.product([args.lr] if args.lr else RATES, DECAYS))
    table = sweep(passes, pairs, evaluation.classes, epochs, args.sweep_images, args.seed)
    lr, decay = max(table, key=lambda pair: table[pair])
    best = f"rate {lr:g}, decay {decay:g}: {table[lr, decay]:.2%} of the validation images"
    logger.info("best of %d pairs: %s", len(pairs), best)
    weight, bias = train_heads(passes, [(lr, decay)], evaluation.classes, epochs, args.seed)

    def classify(images: torch.Tensor) -> torch.Tensor:
        x = _standardize(evaluation.embed(images), mean, deviation).float()
        return x @ weight[0].T + bias[0]

    scores = evaluation.score(classify, frozen=True)
    rows = [{"lr": a, "decay": b, "held_back": round(value, 5)} for (a, b), value in table.items()]
    settings = evaluation.settings(protocol="fast", passes=args.passes, epochs=epochs, lr=lr, weight_decay=decay)
    views = f"{args.passes} augmented pass{'es' * (args.passes > 1)}" if args.passes else "center crops"
    evaluation.write("linear_fast", f"linear, fast, {views}", scores, settings, sweep=rows)


def training_features(evaluation: ClassificationEvaluation) -> list[Pass]:
    """Return features and labels of the training images of all ranks for each pass; without passes, of center crops.

    Complete passes in the cache, of the same settings, are not computed again.
    """
    labels, augmented = evaluation.labels(evaluation.train), evaluation.args.passes > 0
    batch = check_batch(evaluation.args.batch or 256, len(evaluation.train))
    settings = evaluation.settings(batch=batch, world_size=collectives.world())
    names = [f"pass_{number}" for number in range(evaluation.args.passes)] if augmented else ["center"]
    files = [evaluation.out / "linear_fast" / f"{name}.safetensors" for name in names]
    passes: list[Pass] = []
    for file in files:
        if (cached := load_pass(evaluation, file, settings)) is None:
            break
        passes.append(cached)
    missing = files[len(passes) :]
    computed = _augmented(evaluation, batch, len(passes)) if augmented else _centered(evaluation)
    with contextlib.closing(computed):
        for file, (features, ids) in zip(missing, computed, strict=False):
            evaluation.check_frozen()
            passes.append((features, ids))
            try:
                if evaluation.is_main:
                    save_cached(file, settings, {"features": features, "ids": ids})
            except OSError as error:  # the cache only saves time
                logger.warning("%s: features are not cached (%s)", file, describe_error(error))
    return [(features, labels[ids]) for features, ids in passes]


def load_pass(evaluation: ClassificationEvaluation, file: Path, settings: dict[str, Any]) -> Pass | None:
    """Return, on all ranks, the cached features and ids of a pass; None if none fit."""

    def fits(tensors: Tensors) -> bool:
        features, ids = tensors.get("features"), tensors.get("ids")
        if features is None or ids is None or not len(ids) or not valid_ids(ids, len(evaluation.train)):
            return False
        return features.dtype == torch.bfloat16 and features.shape == (len(ids), evaluation.backbone.features)

    cached = read_on_first(lambda: load_cached(file, settings, fits), evaluation.device)
    if cached is None:
        return None
    logger.info("features loaded from %s", file)
    return cached["features"], cached["ids"]


@torch.no_grad()
def _centered(evaluation: ClassificationEvaluation) -> Generator[Pass, None, None]:
    """Yield the features of all ranks' center crops, and their ids."""
    features, ids = evaluation.features(evaluation.train, torch.bfloat16)
    yield evaluation.gather(features, evaluation.train), evaluation.gather(ids, evaluation.train)


@torch.no_grad()
def _augmented(evaluation: ClassificationEvaluation, batch: int, first: int) -> Generator[Pass, None, None]:
    """Yield the features of all ranks' augmented crops, and their ids, pass by pass from pass `first` on, endlessly."""
    with contextlib.closing(evaluation.train_loader(evaluation.train, batch)) as loader:
        loader.load_state_dict({**loader.state_dict(), "epoch": first})
        while True:
            features, ids = [], []
            for crops in evaluation.progress(loader, "batches"):
                features.append(evaluation.embed(crops.views[0]).to(torch.bfloat16))
                ids.append(to_device(crops.ids, evaluation.device))
            yield collectives.gather(torch.cat(features)), collectives.gather(torch.cat(ids))


def _statistics(passes: list[Pass]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of each feature over all passes, float32 [F]; deviation 1 for a constant feature."""
    count = sum(len(x) for x, _ in passes)
    mean = torch.stack([_sum(x, 0.0) for x, _ in passes]).sum(dim=0) / count
    variance = torch.stack([_sum(x, mean, 2) for x, _ in passes]).sum(dim=0) / count
    deviation = variance.sqrt()
    return mean.float(), torch.where(deviation > _EPSILON, deviation, 1.0).float()


def _standardize(x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Return (x - mean) / deviation in bfloat16, block by block."""
    return torch.cat([((part.float() - mean) / deviation).to(torch.bfloat16) for part in x.split(_BLOCK_ROWS)])


def _sum(x: torch.Tensor, mean: torch.Tensor | float, power: int = 1) -> torch.Tensor:
    """Return the sum over rows of (x - mean)^power, in float64, block by block."""
    return torch.stack([((part.double() - mean) ** power).sum(dim=0) for part in x.split(_BLOCK_ROWS)]).sum(dim=0)


def sweep(
    passes: list[Pass], pairs: list[tuple[float, float]], classes: int, epochs: int, limit: int, seed: int
) -> dict[tuple[float, float], float]:
    """Return the accuracy of each pair of rate and decay on validation images.

    These are a tenth, drawn by seed, of at most `limit` evenly spaced images. Each rank trains its part of the pairs.
    """
    count = len(passes[0][0])
    chosen = torch.arange(min(limit, count)) * count // min(limit, count)
    validation = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)) % _VALIDATION == 0
    # Only the first pass: in the others the same images are in other rows, so the two parts would overlap.
    x, y = passes[0][0][chosen], passes[0][1][chosen]
    local = pairs[collectives.rank() :: collectives.world()]
    accuracies = torch.full((-(-len(pairs) // collectives.world()),), -1.0, device=x.device)
    if local:
        weight, bias = train_heads([(x[~validation], y[~validation])], local, classes, epochs, seed)
        for number in range(len(local)):
            logits = x[validation].float() @ weight[number].T + bias[number]
            accuracies[number] = (top5(logits)[:, 0] == y[validation]).float().mean()
    gathered = collectives.gather(accuracies).view(collectives.world(), -1).T.flatten().tolist()  # in order of pairs
    return dict(zip(pairs, gathered, strict=False))


@torch.no_grad()
def train_heads(
    passes: list[Pass], pairs: list[tuple[float, float]], classes: int, epochs: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [H, C, F] and biases [H, C] of linear classifiers, one for each pair of rate and decay.

    SGD of momentum 0.9 on softmax cross-entropy, from 0, on the same batches; each classifier has its rate, with a
    cosine schedule, and its decay of the weights. Epoch e is of pass e mod P.
    """
    x, _ = passes[0]
    heads, features = len(pairs), x.shape[1]
    rate, decay = (torch.tensor([pair[i] for pair in pairs], device=x.device)[:, None, None] for i in (0, 1))
    weight = torch.zeros(heads, classes, features + 1, device=x.device)
    momentum, generator = torch.zeros_like(weight), torch.Generator().manual_seed(seed)
    batch = min(_BATCH, max(1, len(x) // 8))
    steps, step = epochs * (len(x) // batch), 0
    for epoch in range(epochs):
        x, y = passes[epoch % len(passes)]
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order.split(batch):
            if len(rows) < batch:
                break
            gradient = _gradient(x[rows], y[rows], weight)
            gradient[..., :-1] += decay * weight[..., :-1]
            momentum.mul_(0.9).add_(gradient)
            weight -= rate * 0.5 * (1 + math.cos(math.pi * step / steps)) * momentum
            step += 1
    return weight[..., :-1], weight[..., -1]


def _gradient(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the gradient [H, C, F + 1] of the mean cross-entropy of x [B, F], y [B]; the biases are the last column.

    On a GPU the products are in bfloat16 with float32 sums.
    """
    heads, classes, _ = weight.shape
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        x = F.pad(x.float(), (0, 1), value=1.0)  # [B, F + 1]
        logits = x @ weight.flatten(0, 1).T  # [B, H C]
    error = logits.float().view(-1, heads, classes).softmax(dim=2)
    error[torch.arange(len(y), device=y.device), :, y] -= 1
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        gradient = error.flatten(1).T @ x
    return gradient.float().view(heads, classes, -1) / len(x)
