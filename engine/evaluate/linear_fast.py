"""A linear classifier on features that are computed once, kept in bfloat16 on the device, its rate and decay searched.

Each feature is brought to mean 0 and deviation 1 over the training images, so that one range of rates serves all
encoders; the classifier stays linear. All pairs of rate and decay are trained side by side as one product of matrices,
on nine tenths of (at most `--sweep-images`) training images, and judged on the tenth that is left: never on the test
images. The best pair is then trained on all training images. Processes share the pairs among them.

Features stay in OUT/linear_fast, 2 F bytes an image and pass, and are taken up when the command is given again, broken
off or with another rate, number of epochs or of passes. What follows them begins anew.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections.abc import Generator

import torch
from torch.nn import functional as F

from engine.evaluate.accuracy import score
from engine.evaluate.classification import Bench, best
from engine.evaluate.feature_cache import Pass, keep, take_up
from engine.evaluate.trainer import check_batch
from engine.parallel import collectives
from pipeline.system.device import to_device
from pipeline.system.errors import InputError

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
_BATCH, _EPOCHS, _JUDGED = 1024, 50, 10  # every tenth of the images is for judging
_EPSILON = 1e-6
_ROWS = 65536  # of a block
Cached = list[tuple[torch.Tensor, torch.Tensor]]
"""Features [n, F] and labels [n] of each pass over the training images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of protocol fast."""
    group = parser.add_argument_group("protocol fast")
    group.add_argument("--passes", type=int, default=1, help="augmented passes kept; 0: center crops (default: 1)")
    group.add_argument("--sweep-images", type=int, default=100_000, help="that the search is made on, at most")


def run(bench: Bench) -> None:
    """Compute features, search rate and decay, train the best on all images, and score it on the test images."""
    args = bench.args
    if not 0 <= args.passes <= 100 or args.sweep_images < 2 * _JUDGED:
        raise InputError(f"--passes {args.passes} --sweep-images {args.sweep_images}: choose 0 to 100, and 20 or more")
    epochs = int(args.epochs or _EPOCHS)
    passes = kept_features(bench)
    mean, deviation = _statistics(passes)
    passes = [(_normalized(x, mean, deviation), y) for x, y in passes]
    rates = [args.lr] if args.lr else list(RATES)
    pairs = list(itertools.product(rates, DECAYS))
    table = sweep(passes, pairs, bench.classes, epochs, args.sweep_images, args.seed)
    lr, decay = max(table, key=lambda pair: table[pair])
    bench.say(
        f"best of {len(pairs)} pairs: rate {lr:g}, decay {decay:g}: {table[lr, decay]:.2%} of the images held back"
    )
    weight, bias = train_heads(passes, [(lr, decay)], bench.classes, epochs, args.seed)

    def classify(images: torch.Tensor) -> torch.Tensor:
        x = _normalized(bench.embed(images), mean, deviation).float()
        return x @ weight[0].T + bias[0]

    ranked, true = bench.ranked(classify)
    bench.check_frozen()
    scores = score(ranked, true, bench.test.classes)
    found = [{"lr": a, "decay": b, "held_back": round(value, 5)} for (a, b), value in table.items()]
    settings = bench.settings(protocol="fast", passes=args.passes, epochs=epochs, lr=lr, weight_decay=decay)
    views = f"{args.passes} augmented passes" if args.passes else "center crops"
    bench.finish("linear_fast", f"linear, fast, {views}", scores, sweep=found, settings=settings)


def kept_features(bench: Bench) -> Cached:
    """Return the training images' features, bfloat16, of all processes, for each pass; center-cropped for none.

    Each pass is kept in a file when it is whole: those that are there, of the same settings, are not computed again.
    """
    labels, augmented = bench.labels(bench.train), bench.args.passes > 0
    batch = check_batch(bench.args.batch or 256, len(bench.train))
    settings = bench.settings(batch=batch, processes=collectives.world())
    names = [f"pass_{number}" for number in range(bench.args.passes)] if augmented else ["center"]
    files, passes = [bench.out / "linear_fast" / f"{name}.safetensors" for name in names], []
    for file in files:
        if (found := take_up(bench, file, settings)) is None:
            break
        passes.append(found)
    left = files[len(passes) :]
    computed = _augmented(bench, batch, len(passes)) if augmented else _centered(bench)
    with contextlib.closing(computed):
        for file, found in zip(left, computed, strict=False):
            bench.check_frozen()
            keep(bench, file, settings, *found)
            passes.append(found)
    return [(features, labels[ids]) for features, ids in passes]


@torch.no_grad()
def _centered(bench: Bench) -> Generator[Pass, None, None]:
    """Yield the features of all processes, and the ids they are of, center-cropped."""
    found, ids = bench.features(bench.train, torch.bfloat16)
    yield bench.everywhere(found, bench.train), bench.everywhere(ids, bench.train)


@torch.no_grad()
def _augmented(bench: Bench, batch: int, done: int) -> Generator[Pass, None, None]:
    """Yield the same of one pass after another over the crops, without end, after as many as are done."""
    loader = bench.train_loader(bench.train, batch)
    try:
        loader.load_state_dict({**loader.state_dict(), "epoch": done})
        while True:
            parts, read = [], []
            for one in bench.shown(loader, "batches"):
                parts.append(bench.embed(one.views[0]).to(torch.bfloat16))
                read.append(to_device(one.ids, bench.device))
            yield collectives.gather(torch.cat(parts)), collectives.gather(torch.cat(read))
    finally:
        loader.close()


def _statistics(passes: Cached) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of each feature [F], in float32, over all passes; a constant feature's is 1."""
    count = sum(len(x) for x, _ in passes)
    mean = torch.stack([_sum(x, 0.0) for x, _ in passes]).sum(dim=0) / count
    variance = torch.stack([_sum(x, mean, 2) for x, _ in passes]).sum(dim=0) / count
    deviation = variance.sqrt()
    return mean.float(), torch.where(deviation > _EPSILON, deviation, 1.0).float()


def _normalized(x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Return (x - mean) / deviation in bfloat16, a block at a time."""
    return torch.cat([((part.float() - mean) / deviation).to(torch.bfloat16) for part in x.split(_ROWS)])


def _sum(x: torch.Tensor, mean: torch.Tensor | float, power: int = 1) -> torch.Tensor:
    """Return the sum over rows of (x - mean)^power, in float64, a block at a time."""
    return torch.stack([((part.double() - mean) ** power).sum(dim=0) for part in x.split(_ROWS)]).sum(dim=0)


def sweep(
    passes: Cached, pairs: list[tuple[float, float]], classes: int, epochs: int, limit: int, seed: int
) -> dict[tuple[float, float], float]:
    """Return, for each pair of rate and decay, the share right of images it was not trained on.

    Those are a tenth of at most `limit` evenly spread ones, drawn by seed; each process trains its share of the pairs.
    """
    count = len(passes[0][0])
    chosen = torch.arange(min(limit, count)) * count // min(limit, count)
    judging = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)) % _JUDGED == 0
    # Of several passes only the first is searched on: in the others the same images stand in other places.
    x, y = passes[0][0][chosen], passes[0][1][chosen]
    own = pairs[collectives.rank() :: collectives.world()]
    shares = torch.full((-(-len(pairs) // collectives.world()),), -1.0, device=x.device)
    if own:
        weight, bias = train_heads([(x[~judging], y[~judging])], own, classes, epochs, seed)
        for number in range(len(own)):
            logits = x[judging].float() @ weight[number].T + bias[number]
            shares[number] = (best(logits)[:, 0] == y[judging]).float().mean()
    everyone = collectives.gather(shares).view(collectives.world(), -1).tolist()
    return {
        pair: everyone[number % collectives.world()][number // collectives.world()] for number, pair in enumerate(pairs)
    }


@torch.no_grad()
def train_heads(
    passes: Cached, pairs: list[tuple[float, float]], classes: int, epochs: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [H, C, F] and biases [H, C] of linear classifiers, one for each pair of rate and decay.

    SGD of momentum 0.9 on softmax cross-entropy, all from 0, each with its own rate, which falls by a cosine, and its
    own decay of the weights; in batches of the same images. Epoch e is of pass e mod P.
    """
    x, _ = passes[0]
    heads, features = len(pairs), x.shape[1]
    rate, decay = (torch.tensor([pair[i] for pair in pairs], device=x.device)[:, None, None] for i in (0, 1))
    weight = torch.zeros(heads, classes, features + 1, device=x.device)
    momentum, generator = torch.zeros_like(weight), torch.Generator().manual_seed(seed)
    batch = min(_BATCH, max(1, len(x) // 8))
    steps, step = epochs * sum(1 for _ in range(0, len(x) - batch + 1, batch)), 0
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
    """Return the gradient [H, C, F + 1] of the mean cross-entropy of x [B, F], y [B]; the last column is the biases'.

    The products are in bfloat16 on a GPU, whose sums are float32.
    """
    heads, classes, _ = weight.shape
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        x = F.pad(x.float(), (0, 1), value=1.0)  # [B, F + 1]
        logits = x @ weight.flatten(0, 1).T  # [B, H C]
    error = logits.float().view(-1, heads, classes).softmax(dim=2)
    error[torch.arange(len(y), device=y.device), :, y] -= 1
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        found = error.flatten(1).T @ x
    return found.float().view(heads, classes, -1) / len(x)
