"""What evaluations on betons share: two of them, their loaders, features, and the likeliest classes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.evaluate.accuracy import Scores
from engine.evaluate.evaluation import Trial, share_of, start
from engine.evaluate.splits import HELD_OUT, held_out, refuse_other_classes, refuse_unlabeled, unseen
from engine.parallel import collectives
from engine.parallel.consensus import all_gather_object
from engine.parallel.rendezvous import local_world
from methods.vit import PATCH
from pipeline.backends.select_backend import Choice, agreed, choose
from pipeline.beton import Beton, count_classes
from pipeline.loader import CenterLoader, Loader
from pipeline.storage.in_place import open_data
from pipeline.storage.subset import Subset
from pipeline.system.errors import InputError
from pipeline.views import View

CROP_AND_FLIP = View(scale=(0.08, 1.0), jitter=0.0, gray=0.0, blur=0.0)
"""RandomResizedCrop and a flip: what classifiers are trained on, in every protocol here."""
_FEW, _FEW_PIXELS = 16, 1 << 16  # images at least, and their pixels


@dataclass
class Bench(Trial):
    """An encoder and the betons, or what is read as one, that it is tried on."""

    train: Beton
    test: Beton
    backends: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Side of the views, pixels."""
        return self.args.size or self.encoder.architecture.size

    @property
    def share(self) -> float:
        """Side of the test crop over the image's shorter side."""
        stated = self.encoder.settings.get("data", {}).get("eval_crop_ratio", 0.875)
        return float(self.args.share or stated)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return count_classes(self.train, self.test)

    def loading(self, beton: Beton) -> dict[str, Any]:
        """Return the loaders' options."""
        if beton.fingerprint not in self.backends:
            sharing = {"processes": local_world(), "cores": self.workers}
            wanted = all_gather_object(lambda: choose(self.args.backend, beton, self.device, **sharing))
            self.backends[beton.fingerprint] = agreed([Choice(*choice) for choice in wanted]).name
        return {
            "size": self.size,
            "device": self.device,
            "workers": self.workers,
            "backend": self.backends[beton.fingerprint],
            "on_bad": self.args.on_bad,
        }

    def train_loader(self, beton: Beton, batch: int) -> Loader:
        """Return this process's crops for training a classifier: one view, of a global batch of so many."""
        place: dict[str, Any] = {"rank": collectives.rank(), "world": collectives.world(), **self.loading(beton)}
        return Loader(beton, (CROP_AND_FLIP,), batch=batch, seed=self.args.seed, **place)

    def centered(self, beton: Beton) -> CenterLoader:
        """Return this process's share of a data set, center-cropped."""
        batch = self.args.batch or 256
        return CenterLoader(beton, indices=share_of(beton), batch=batch, share=self.share, **self.loading(beton))

    @torch.no_grad()
    def features(self, beton: Beton, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [n, F] of this process's share, center-cropped, and the ids int64 [n] that were read."""
        found, ids = [], []
        images = self.centered(beton)
        try:
            for batch, read in self.shown(images, "batches"):
                found.append(self.embed(batch).to(dtype))
                ids.append(read)
        finally:
            images.close()
        return torch.cat(found), torch.from_numpy(np.concatenate(ids)).to(self.device)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the backbone's features [B, F] of images [B, 3, S, S], float32.

        On a CPU a few at a time: activations of many leave its caches, and are given fresh memory layer by layer.
        """
        few = len(images) if images.is_cuda else max(_FEW, _FEW_PIXELS // self.size**2)
        with self.accelerator.autocast():
            return torch.cat([self.backbone(part).float() for part in images.split(few)])

    def labels(self, beton: Beton) -> torch.Tensor:
        """Return all labels, int64 [N], on the device."""
        return torch.from_numpy(beton.labels).to(self.device)

    @torch.no_grad()
    def ranked(self, classify: Callable[[torch.Tensor], torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Return the five likeliest classes of all test images, int64 [N, 5], and their labels.

        classify: images [B, 3, S, S] to logits [B, C].
        """
        images, found, ids = self.centered(self.test), [], []
        try:
            for batch, read in images:
                found.append(best(classify(batch)))
                ids.append(torch.from_numpy(read).to(self.device))
        finally:
            images.close()
        true = self.everywhere(self.labels(self.test)[torch.cat(ids)], self.test)
        return self.everywhere(torch.cat(found), self.test).cpu().numpy(), true.cpu().numpy()

    def settings(self, **own: Any) -> dict[str, Any]:
        """Return what a result depends on: plain JSON values."""
        return super().settings(size=self.size, share=self.share, **own)

    def finish(self, name: str, what: str, scores: Scores, **more: Any) -> dict[str, Any]:
        """Write OUT/NAME.json and print the scores and a line for a table; return what was written."""
        return self.write(name, {**scores.as_dict(), **more}, what, f"{100 * scores.top1:.2f}", scores)

    def check(self) -> None:
        """Raise InputError for options that cannot work."""
        architecture = self.encoder.architecture
        if architecture.transformer and self.size != architecture.size:
            raise InputError(f"--size {self.size}: {architecture} has positions for that size alone: leave it out")
        if not 8 <= self.size <= 1024:
            raise InputError(
                f"--size {self.size}: choose 8 to 1024 pixels" + f", a multiple of {PATCH}" * architecture.transformer
            )
        if not 0 < self.share <= 1:
            raise InputError(f"--share {self.share}: choose a share above 0, up to 1")
        super().check()


def best(logits: torch.Tensor) -> torch.Tensor:
    """Return the five likeliest classes, int64 [B, 5], -1 where there are fewer."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return nn.functional.pad(found, (0, 5 - found.shape[1]), value=-1)


def setup(args: argparse.Namespace, *, labeled: bool = True) -> Bench:
    """Return the bench of a command line. Raises InputError, on all processes, for what cannot work."""
    bench = start(Bench, args, lambda: _open(args, labeled))
    if labeled and (count := unseen(bench.train.labels, bench.test.labels, bench.test.path)):
        bench.say(f"warning: {count} of {len(bench.test)} images to test on are of classes without images to train on")
    return bench


def _open(args: argparse.Namespace, labeled: bool) -> tuple[Beton, Beton]:
    """Return the two data sets; of one, every tenth image, counted class by class, is the second."""
    tolerate = args.on_bad == "skip"
    train = open_data(args.train, tolerate=tolerate)
    test = open_data(args.test, tolerate=tolerate) if args.test else train
    if labeled:
        refuse_unlabeled(train, test)
    refuse_other_classes(train, test)
    there = train.path.exists() and test.path.exists()  # a pattern of shards is no path
    same = train.fingerprint == test.fingerprint or (there and test.path.samefile(train.path))
    if not same or not labeled:
        return train, test
    if len(train) < 2 * HELD_OUT:
        raise InputError(f"{train.path}: {len(train)} images, of which every tenth is to be for testing: give --test")
    queries = held_out(train.labels)
    return Subset(train, np.flatnonzero(~queries)), Subset(train, np.flatnonzero(queries))
