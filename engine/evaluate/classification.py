"""Evaluations on betons: loaders, features and predicted classes."""

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import nn

from engine.evaluate import evaluation
from engine.evaluate.accuracy import Accuracy, score
from engine.evaluate.evaluation import Evaluation, shard
from engine.evaluate.splits import HELD_OUT, count_unseen_labels, held_out, refuse_other_classes, refuse_unlabeled
from engine.parallel.consensus import all_gather_object
from engine.parallel.rendezvous import local_world
from methods.vit import PATCH
from pipeline.backends import BACKENDS
from pipeline.backends.select_backend import Choice, choose, least_demanding
from pipeline.beton import Beton, count_classes
from pipeline.loader import CenterLoader, Loader
from pipeline.storage.in_place import open_data
from pipeline.storage.subset import Subset
from pipeline.system.errors import InputError
from pipeline.views import View

logger = get_logger(__name__)

CROP_AND_FLIP = View(crop_scale=(0.08, 1.0), jitter_p=0.0, gray_p=0.0, blur_p=0.0)
"""RandomResizedCrop and a flip: the training augmentation of every protocol here."""
_MIN_CHUNK, _CHUNK_PIXELS = 16, 1 << 16  # images in a chunk on the CPU: at least, and by their pixels


@dataclass
class ClassificationEvaluation(Evaluation):
    """An encoder, and betons (or data read like betons) as training and test set."""

    train: Beton
    test: Beton
    backends: dict[str, str] = field(init=False, default_factory=dict)
    """Loader backend, by fingerprint of the data set."""

    @property
    def size(self) -> int:
        """Side of the views, pixels."""
        return self.args.size or self.encoder.architecture.size

    @property
    def crop_ratio(self) -> float:
        """Side of the test crop over the image's shorter side."""
        return float(self.args.crop_ratio or self.encoder.crop_ratio)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return count_classes(self.train, self.test)

    def loader_options(self, beton: Beton) -> dict[str, Any]:
        """Return the options of both loaders. All ranks choose the backend together, once for a data set."""
        if beton.fingerprint not in self.backends:
            sharing = {"local_world": local_world(), "cores": self.workers}
            choices = all_gather_object(lambda: choose(self.args.backend, beton, self.device, **sharing))
            self.backends[beton.fingerprint] = least_demanding([Choice(*choice) for choice in choices]).name
        return {
            "size": self.size,
            "device": self.device,
            "workers": self.workers,
            "backend": self.backends[beton.fingerprint],
            "on_bad": self.args.on_bad,
            "statistics": self.encoder.statistics,
        }

    def train_loader(self, beton: Beton, batch: int) -> Loader:
        """Return this rank's loader of training crops, one view of each image, for a global batch size."""
        options = self.loader_options(beton) | self.sharding
        return Loader(beton, (CROP_AND_FLIP,), batch=batch, seed=self.args.seed, **options)

    def center_loader(self, beton: Beton, indices: np.ndarray) -> CenterLoader:
        """Return a loader of center crops of the images `indices`."""
        options = {"batch": self.args.batch or 256, "crop_ratio": self.crop_ratio, **self.loader_options(beton)}
        return CenterLoader(beton, indices=indices, **options)

    def features(self, beton: Beton, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [n, F] of the center crops of this rank's shard, and the ids of the records, int64 [n]."""
        return self._map(lambda images: self.embed(images).to(dtype), beton)

    @torch.no_grad()
    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], beton: Beton) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a function's rows of the center crops of this rank's shard, and the ids of the records, int64 [n]."""
        rows, ids = [], []
        with contextlib.closing(self.center_loader(beton, shard(beton))) as loader:
            for images, batch_ids in self.progress(loader, "batches"):
                rows.append(function(images))
                ids.append(batch_ids)
        return torch.cat(rows), torch.from_numpy(np.concatenate(ids)).to(self.device)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the backbone's features [B, F] of images [B, 3, S, S], float32.

        On a CPU in small chunks: activations of a large batch exceed its caches and need fresh memory at every layer.
        """
        chunk = len(images) if images.is_cuda else max(_MIN_CHUNK, _CHUNK_PIXELS // self.size**2)
        with self.accelerator.autocast():
            return torch.cat([self.backbone(part).float() for part in images.split(chunk)])

    def labels(self, beton: Beton) -> torch.Tensor:
        """Return all labels, int64 [N], on the device."""
        return torch.from_numpy(beton.labels.astype(np.int64)).to(self.device)

    def score(self, classify: Callable[[torch.Tensor], torch.Tensor], *, frozen: bool) -> Accuracy:
        """Return the scores of a classifier on all test images.

        classify: images [B, 3, S, S] to logits [B, C]. frozen: raise RunFailed if the backbone has changed.
        """
        classes, ids = self._map(lambda images: top5(classify(images)), self.test)
        rows = (self.gather(local, self.test) for local in (classes, self.labels(self.test)[ids]))
        predicted, labels = (gathered.cpu().numpy() for gathered in rows)
        if frozen:
            self.check_frozen()
        return score(predicted, labels, self.test.classes)

    def settings(self, **options: Any) -> dict[str, Any]:
        """Return all settings that affect the result, as plain JSON values."""
        return super().settings(size=self.size, crop_ratio=self.crop_ratio, **options)

    def check(self) -> None:
        """Create the folder of results. Raises InputError for it or for other options that cannot work."""
        architecture = self.encoder.architecture
        if architecture.transformer and self.size != architecture.size:
            raise InputError(f"--size {self.size}: {architecture} has positions for that size only: leave it out")
        if not 8 <= self.size <= 1024:
            raise InputError(
                f"--size {self.size}: choose 8 to 1024 pixels" + f", a multiple of {PATCH}" * architecture.transformer
            )
        if not 0 < self.crop_ratio <= 1:
            raise InputError(f"--crop-ratio {self.crop_ratio}: choose a ratio above 0, up to 1")
        super().check()


def top5(logits: torch.Tensor) -> torch.Tensor:
    """Return the five likeliest classes, int64 [B, 5], padded with -1."""
    classes = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return nn.functional.pad(classes, (0, 5 - classes.shape[1]), value=-1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every evaluation on betons."""
    evaluation.add_arguments(parser)
    parser.add_argument("--train", required=True, metavar="DATA", help="beton, folder or tar, labeled")
    parser.add_argument("--test", metavar="DATA", help="the same (default: every tenth of each class of --train)")
    parser.add_argument("--size", type=int, help="side of the views, pixels (default: the encoder's)")
    parser.add_argument(
        "--crop-ratio", type=float, help="side of the test crop over the shorter side (default: the run's, or 0.875)"
    )
    parser.add_argument("--backend", choices=["auto", *BACKENDS], default="auto")
    parser.add_argument("--on-bad", choices=["error", "skip"], default="error", help="action for a damaged record")


def build(args: argparse.Namespace, *, labeled: bool = True) -> ClassificationEvaluation:
    """Return the evaluation of a command line. Raises InputError, on all ranks, for options that cannot work."""
    made = evaluation.build(ClassificationEvaluation, args, lambda: _open(args, labeled))
    if labeled and (count := count_unseen_labels(made.train.labels, made.test.labels, made.test.path)):
        logger.warning("%d of %d test images are of classes without training images", count, len(made.test))
    return made


def _open(args: argparse.Namespace, labeled: bool) -> tuple[Beton, Beton]:
    """Return training and test set. If labeled and from one file, every tenth image of a class is the test set."""
    tolerate = args.on_bad == "skip"
    train = open_data(args.train, tolerate=tolerate)
    test = open_data(args.test, tolerate=tolerate) if args.test else train
    if labeled:
        refuse_unlabeled(train, test)
    refuse_other_classes(train, test)
    paths_exist = train.path.exists() and test.path.exists()  # not for a pattern of shards
    same = train.fingerprint == test.fingerprint or (paths_exist and test.path.samefile(train.path))
    if not same or not labeled:
        return train, test
    if len(train) < 2 * HELD_OUT:
        raise InputError(f"{train.path}: {len(train)} images are too few to hold out every tenth: give --test")
    queries = held_out(train.labels)
    return Subset(train, np.flatnonzero(~queries)), Subset(train, np.flatnonzero(queries))
