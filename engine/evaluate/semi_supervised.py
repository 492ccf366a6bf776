"""Fine-tuning of the whole network on 1 % or 10 % of the labels.

Rates, epochs and steps are facebookresearch/swav's (`eval_semisup.py` and its README): SGD of momentum 0.9 without
decay, a batch of 256, 20 epochs, times 0.2 after 12 and 16; rates of backbone and classifier 0.02 and 5 for 1 %, 0.01
and 0.2 for 10 %. They grow with the batch. BatchNorm trains, over all processes.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from engine.evaluate.accuracy import score
from engine.evaluate.classification import Bench
from engine.evaluate.trainer import Kept, check_batch, new_head, sgd
from engine.parallel.accelerator import prepared
from engine.parallel.sync_batchnorm import synchronize
from methods.encoders import place
from pipeline.beton import Beton
from pipeline.storage.subset import Subset
from pipeline.system.device import to_device
from pipeline.system.errors import InputError
from pipeline.system.limits import LIST_BYTES, read_text
from pipeline.system.text import printable

_RATES = {0.01: (0.02, 5.0), 0.1: (0.01, 0.2)}
_STEPS, _FACTOR = (0.6, 0.8), 0.2
_FEW = 200  # ImageNet has 1000 with 1 % of its labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of fine-tuning."""
    parser.add_argument("--labels", type=float, default=0.01, help="share of each class (default: 0.01)")
    parser.add_argument("--names", type=Path, help="instead: a file of image names, one a line, such as SimCLR's")
    parser.add_argument("--epochs", type=int, default=20, help="(default: 20)")
    parser.add_argument("--lr", type=float, help="of the backbone, for a batch of 256 (default: by --labels)")
    parser.add_argument("--lr-head", type=float, help="of the classifier (default: by --labels)")


class Classifier(nn.Module):
    """A backbone and a linear classifier: images [B, 3, S, S] to logits [B, C], in float32."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features.float())


def run(bench: Bench) -> None:
    """Fine-tune on part of the labels, and score on the test images."""
    args = bench.args
    if args.epochs < 1:
        raise InputError(f"--epochs {args.epochs}: choose 1 or more")
    chosen = named(bench.train, args.names) if args.names else balanced(bench.train.labels, args.labels, args.seed)
    part, share = Subset(bench.train, chosen), len(chosen) / len(bench.train)
    usual = _RATES[min(_RATES, key=lambda known: abs(math.log(known / share)))]
    lr, lr_head = args.lr or usual[0], args.lr_head or usual[1]
    batch = check_batch(args.batch or 256, len(part))
    settings = bench.settings(images=len(part), part=part.fingerprint, epochs=args.epochs, batch=batch, lr=lr)
    settings |= {"lr_head": lr_head}
    bench.say(f"{len(part)} of {len(bench.train)} labels ({share:.2%}), batches of {batch}")
    steps = args.epochs * (len(part) // batch)
    if steps < _FEW:
        bench.say(f"warning: {steps} steps in all, too few to learn from: choose a smaller --batch or more --epochs")
    name = f"semi_{args.names.stem}" if args.names else f"semi_{args.labels:g}"
    model, seconds = tune(bench, part, batch, (lr, lr_head), name, settings)
    model.eval()

    def classify(images: torch.Tensor) -> torch.Tensor:
        with bench.accelerator.autocast():
            return model(images)

    ranked, true = bench.ranked(classify)
    scores = score(ranked, true, bench.test.classes)
    what = f"fine-tuned on {share:.3g} of the labels, {args.epochs} epochs"
    bench.finish(name, what, scores, images=len(part), training_seconds=round(seconds, 2), settings=settings)


def tune(
    bench: Bench, part: Beton, batch: int, rates: tuple[float, float], name: str, settings: dict[str, object]
) -> tuple[nn.Module, float]:
    """Return the fine-tuned network and the seconds it took; an attempt that was broken off is gone on from."""
    backbone = bench.backbone
    backbone.requires_grad_(True)
    head = new_head(backbone.features, bench.classes, bench.args.seed)  # type: ignore[arg-type]
    model = Classifier(backbone, head)
    if bench.accelerator.num_processes > 1:
        synchronize(model, bench.device)
    place(model, bench.device)
    groups = [{"params": list(module.parameters())} for module in (model.backbone, model.head)]
    bare = sgd(groups)
    kept = Kept(bench, name, model, bare, settings)
    done = kept.restore()
    wrapped, optimizer = prepared(bench.accelerator, model, bare)
    labels, loader = bench.labels(part), bench.train_loader(part, batch)
    loader.load_state_dict({**loader.state_dict(), "epoch": done})
    began = time.perf_counter()
    try:
        for epoch in bench.shown(range(done, bench.args.epochs), "epochs"):
            factor = batch / 256 * _FACTOR ** sum(epoch / bench.args.epochs >= at for at in _STEPS)
            for group, rate in zip(bare.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            wrapped.train()
            loss = torch.zeros((), device=bench.device)
            for one in loader:
                with bench.accelerator.autocast():
                    logits = wrapped(one.views[0])
                loss = F.cross_entropy(logits.float(), labels[to_device(one.ids, bench.device)])
                bench.accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is not finite: choose a lower --lr or --lr-head")
            kept.save(epoch + 1)
    finally:
        loader.close()
    return model, time.perf_counter() - began


def balanced(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return samples of each class drawn by `seed`, int64, sorted: that share of it, rounded, and one at least."""
    if not 0 < share <= 1:
        raise InputError(f"--labels {share:g}: choose a share above 0, up to 1, such as 0.01")
    chosen = []
    for label in np.unique(labels):
        of = np.flatnonzero(labels == label)
        count = max(1, round(share * len(of)))
        chosen.append(np.random.default_rng((seed, int(label))).permutation(of)[:count])
    return np.sort(np.concatenate(chosen))


def named(beton: Beton, file: Path) -> np.ndarray:
    """Return the samples that a file names, int64, sorted. Names may leave out folders.

    Raises InputError where the file cannot be read, or names what is not there.
    """
    lines = read_text(file, LIST_BYTES, "give --names a text file of one name a line", "surrogateescape").splitlines()
    wanted = [printable(line.strip()) for line in lines if line.strip()]
    where: dict[str, int] = {}
    for index in range(len(beton)):
        name = beton.name(index)
        if re.fullmatch(r"number \d+", name):
            raise InputError(f"{beton.path}: has no manifest, and so no names: prepare it, or give --labels")
        where[name] = where[PurePosixPath(name).name] = index
    missing = [name for name in wanted if name not in where and PurePosixPath(name).name not in where]
    if missing or not wanted:
        what = f"{missing[0]} and {len(missing) - 1} others are" if missing else "it names no image, or none is"
        raise InputError(f"--names {file}: {what} not in {beton.path}, whose names are like {beton.name(0)}")
    found = [where[name] if name in where else where[PurePosixPath(name).name] for name in wanted]
    return np.unique(np.array(found, np.int64))
