"""What all evaluations share: an encoder on the device, two data sets, features, and where the result goes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from engine import ranks
from engine.config import Settings
from engine.devices import build_accelerator
from engine.evaluate import HELD_OUT, held_out
from engine.meeting import from_all, together
from engine.probes.scores import Scores
from engine.weights import Loaded, digest, load_encoder
from methods.encoders import place
from methods.vit import PATCH
from pipeline.backends.choice import Choice, agreed, choose
from pipeline.beton import Beton, count_classes
from pipeline.cores import available_cores
from pipeline.direct import open_data
from pipeline.errors import InputError, RunFailed
from pipeline.loader import CentreLoader, Loader
from pipeline.progress import progress
from pipeline.subset import Subset
from pipeline.views import View

CROP_AND_FLIP = View(scale=(0.08, 1.0), jitter=0.0, grey=0.0, blur=0.0)
"""RandomResizedCrop and a flip: what classifiers are trained on, in every protocol here."""


@dataclass
class Bench:
    """An encoder and the data it is tried on."""

    args: argparse.Namespace
    accelerator: Accelerator
    encoder: Loaded
    train: Beton
    test: Beton
    out: Path
    began: float = field(default_factory=time.perf_counter)
    fingerprint: str = ""
    """Of the backbone as it was loaded."""
    backends: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fingerprint = digest(self.encoder.backbone)
        place(self.backbone, self.device)

    @property
    def backbone(self) -> nn.Module:
        """The backbone, on the device."""
        return self.encoder.backbone

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.accelerator.device

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return ranks.rank() == 0

    @property
    def size(self) -> int:
        """Side of the views, pixels."""
        return self.args.size or self.encoder.architecture.size

    @property
    def share(self) -> float:
        """Side of the test crop over the image's shorter side."""
        stated = self.encoder.settings.get("data", {}).get("eval_share", 0.875)
        return float(self.args.share or stated)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return count_classes(self.train, self.test)

    def loading(self, beton: Beton) -> dict[str, Any]:
        """Return the loaders' options."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world()))
        workers = self.args.workers or max(1, available_cores() // processes)
        if beton.fingerprint not in self.backends:
            sharing = {"processes": processes, "cores": workers}
            wanted = from_all(lambda: choose(self.args.backend, "auto", beton, self.device, **sharing))
            self.backends[beton.fingerprint] = agreed([Choice(*choice) for choice in wanted]).name
        return {
            "size": self.size,
            "device": self.device,
            "workers": workers,
            "backend": self.backends[beton.fingerprint],
            "on_bad": self.args.on_bad,
        }

    def train_loader(self, beton: Beton, batch: int) -> Loader:
        """Return this process's crops for training a classifier: one view, of a global batch of so many."""
        place: dict[str, Any] = {"rank": ranks.rank(), "world": ranks.world(), **self.loading(beton)}
        return Loader(beton, (CROP_AND_FLIP,), batch=batch, seed=self.args.seed, **place)

    def centred(self, beton: Beton, batch: int = 0) -> CentreLoader:
        """Return this process's share of a data set, centre-cropped: runs of neighbours, as even as can be."""
        indices = np.array_split(np.arange(len(beton)), ranks.world())[ranks.rank()]
        batch = batch or self.args.batch or 256
        return CentreLoader(beton, indices=indices, batch=batch, share=self.share, **self.loading(beton))

    def counts(self, beton: Beton) -> list[int]:
        """Return the sizes of all processes' shares."""
        return [len(part) for part in np.array_split(np.arange(len(beton)), ranks.world())]

    @torch.no_grad()
    def features(self, beton: Beton, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [n, F] of this process's share, centre-cropped, and the ids int64 [n] that were read."""
        found, ids = [], []
        images = self.centred(beton)
        try:
            for batch, read in self.shown(images, "batches"):
                found.append(self.embed(batch).to(dtype))
                ids.append(read)
        finally:
            images.close()
        return torch.cat(found), torch.from_numpy(np.concatenate(ids)).to(self.device)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the backbone's features [B, F] of images [B, 3, S, S], float32."""
        with self.accelerator.autocast():
            return self.backbone(images).float()

    def labels(self, beton: Beton) -> torch.Tensor:
        """Return all labels, int64 [N], on the device."""
        return torch.from_numpy(beton.labels).to(self.device)

    def everywhere(self, local: torch.Tensor, beton: Beton) -> torch.Tensor:
        """Return the rows of all processes' shares, in order."""
        return ranks.gather_uneven(local, self.counts(beton))

    @torch.no_grad()
    def ranked(self, classify: Callable[[torch.Tensor], torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Return the five likeliest classes of all test images, int64 [N, 5], and their labels.

        classify: images [B, 3, S, S] to logits [B, C].
        """
        images, found, ids = self.centred(self.test), [], []
        try:
            for batch, read in images:
                found.append(best(classify(batch)))
                ids.append(torch.from_numpy(read).to(self.device))
        finally:
            images.close()
        true = self.everywhere(self.labels(self.test)[torch.cat(ids)], self.test)
        return self.everywhere(torch.cat(found), self.test).cpu().numpy(), true.cpu().numpy()

    def shown(self, items: Any, unit: str) -> Any:
        """Yield the items, with progress on the first process."""
        return progress(items, unit, quiet=not self.first)

    def say(self, line: str) -> None:
        """Print to stderr, once."""
        if self.first:
            print(line, file=sys.stderr, flush=True)

    def check_frozen(self) -> None:
        """Raise RunFailed where the backbone is not, bit for bit, the one that was loaded."""
        if digest(self.backbone) != self.fingerprint:
            raise RunFailed("the backbone changed while it was evaluated: the result would mean nothing")

    def settings(self, **own: Any) -> dict[str, Any]:
        """Return what a result depends on: plain JSON values."""
        return {
            "encoder": self.fingerprint,
            "train": self.train.fingerprint,
            "test": self.test.fingerprint,
            "size": self.size,
            "share": self.share,
            "precision": self.accelerator.mixed_precision,
            "seed": self.args.seed,
            **own,
        }

    def finish(self, name: str, what: str, scores: Scores, **more: Any) -> dict[str, Any]:
        """Write OUT/NAME.json and print the scores and a line for a table; return what was written."""
        return self.write(name, {**scores.as_dict(), **more}, what, f"{100 * scores.top1:.2f}", scores)

    def write(self, name: str, result: dict[str, Any], what: str, figure: str, scores: Any) -> dict[str, Any]:
        """Write a result of any kind; `figure` is the one that goes into the table."""
        encoder, seconds = self.encoder, time.perf_counter() - self.began
        cells = [f"{encoder.path.name} {encoder.which}", str(encoder.architecture), what, figure, f"{seconds:.0f} s"]
        document = {
            "evaluation": what,
            "checkpoint": str(encoder.path),
            "which": encoder.which,
            "architecture": str(encoder.architecture),
            "train": str(self.train.path),
            "test": str(self.test.path),
            **result,
            "seconds": round(seconds, 2),
            "device": str(self.device),
            "processes": ranks.world(),
            "torch": torch.__version__,
        }
        if self.first:
            path = self.out / f"{name}.json"
            path.write_text(json.dumps(document, indent=1) + "\n")
            print(f"{what}: {scores}")
            print(f"| {' | '.join(cells)} |")
            self.say(f"written: {path}")
        return document


def best(logits: torch.Tensor) -> torch.Tensor:
    """Return the five likeliest classes, int64 [B, 5], -1 where there are fewer."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return nn.functional.pad(found, (0, 5 - found.shape[1]), value=-1)


def setup(args: argparse.Namespace, *, labelled: bool = True) -> Bench:
    """Return the bench of a command line. Raises InputError, on all processes, for what cannot work."""
    accelerator = build_accelerator(Settings(precision=args.precision, cpu=args.cpu, tracker="none", seed=args.seed))
    encoder = together(lambda: load_encoder(args.checkpoint, args.which, heads=args.heads))
    out = args.out or _beside(args.checkpoint)
    train, test = together(
        lambda: _open(args, labelled),
        lambda sets: {f"--{n}": s.fingerprint for n, s in zip(("train", "test"), sets, strict=True)},
    )
    bench = Bench(args, accelerator, encoder, train, test, out)
    together(lambda: _check(bench))
    bench.say(encoder.summary())
    for warning in encoder.warnings:
        bench.say(f"warning: {warning}")
    return bench


def _open(args: argparse.Namespace, labelled: bool) -> tuple[Beton, Beton]:
    """Return the two data sets; of one, every tenth image, counted class by class, is the second."""
    tolerate = args.on_bad == "skip"
    train = open_data(args.train, tolerate=tolerate)
    test = open_data(args.test, tolerate=tolerate) if args.test else train
    for beton in (train, test) if labelled else ():
        if (beton.labels < 0).any():
            raise InputError(f"{beton.path}: has images without a label: prepare it from class folders")
    if train.classes and test.classes and train.classes != test.classes:
        raise InputError(
            f"{test.path}: its {len(test.classes)} classes are not the {len(train.classes)} of {train.path}: prepare "
            "both from the same class folders"
        )
    same = train.fingerprint == test.fingerprint or (test.path.exists() and test.path.samefile(train.path))
    if not same or not labelled:
        return train, test
    if len(train) < 2 * HELD_OUT:
        raise InputError(f"{train.path}: {len(train)} images, of which every tenth is to be for testing: give --test")
    queries = held_out(train.labels)
    return Subset(train, np.flatnonzero(~queries)), Subset(train, np.flatnonzero(queries))


def _check(bench: Bench) -> None:
    """Refuse what cannot work."""
    args, architecture = bench.args, bench.encoder.architecture
    if architecture.transformer and bench.size != architecture.size:
        raise InputError(f"--size {bench.size}: {architecture} has positions for that size alone: leave it out")
    if not 8 <= bench.size <= 1024:
        raise InputError(
            f"--size {bench.size}: choose 8 to 1024 pixels" + f", a multiple of {PATCH}" * architecture.transformer
        )
    if not 0 < bench.share <= 1:
        raise InputError(f"--share {bench.share}: choose a share above 0, up to 1")
    if args.batch is not None and args.batch < 1:
        raise InputError(f"--batch {args.batch}: choose 1 or more")
    if len(bench.test) < ranks.world():
        raise InputError(f"{bench.test.path}: {len(bench.test)} images for {ranks.world()} processes: start fewer")
    try:
        bench.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {bench.out}: cannot be made ({error.strerror}): choose another folder") from None


def _beside(checkpoint: Path) -> Path:
    """Return the folder of results for a checkpoint: of the run that it is of, or beside the file."""
    path = checkpoint.resolve()
    for folder in (path, *path.parents[:2]):
        if (folder / "checkpoints").is_dir():
            return folder / "evaluation"
    return path.with_name(f"{path.name}.evaluation")
