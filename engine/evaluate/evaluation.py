"""An encoder that is tried on two data sets, whatever these are, and where the result goes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from engine.config.settings import Settings
from engine.parallel import collectives
from engine.parallel.accelerator import build_accelerator, warn_of_precision
from engine.parallel.consensus import run_on_all_ranks
from engine.parallel.rendezvous import cores_per_rank
from engine.weights.load import Loaded, digest, load_encoder
from methods.encoders import place
from pipeline.system.errors import InputError, RunFailed
from pipeline.system.files import write_json
from pipeline.system.progress import progress


class Data(Protocol):
    """A set of images."""

    @property
    def path(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


@dataclass
class Trial:
    """An encoder and the data it is tried on."""

    args: argparse.Namespace
    accelerator: Accelerator
    encoder: Loaded
    train: Data
    test: Data
    out: Path
    began: float = field(default_factory=time.perf_counter)
    fingerprint: str = ""
    """Of the backbone as it was loaded."""

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
        return collectives.rank() == 0

    @property
    def workers(self) -> int:
        """Threads of this process that load images."""
        return self.args.workers or cores_per_rank()

    @property
    def sharing(self) -> dict[str, int]:
        """Rank, world and threads, as loaders want them."""
        return {"rank": collectives.rank(), "world": collectives.world(), "workers": self.workers}

    def everywhere(self, local: torch.Tensor, data: Data) -> torch.Tensor:
        """Return the rows of all processes' shares of a data set, in order."""
        return collectives.gather_uneven(local, [len(share) for share in collectives.shares(np.arange(len(data)))])

    def shown(self, items: Any, unit: str) -> Any:
        """Yield the items, with progress on the first process."""
        return progress(items, unit, quiet=not self.first)

    def say(self, line: str) -> None:
        """Print to stderr, once."""
        if self.first:
            print(line, file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise InputError for options that cannot work."""
        if self.args.batch is not None and self.args.batch < 1:
            raise InputError(f"--batch {self.args.batch}: choose 1 or more")
        if len(self.test) < collectives.world():
            raise InputError(
                f"{self.test.path}: {len(self.test)} images for {collectives.world()} processes: start fewer"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot be made ({error.strerror}): choose another folder") from None

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
            "precision": self.accelerator.mixed_precision,
            "seed": self.args.seed,
            **own,
        }

    def write(self, name: str, result: dict[str, Any], what: str, figure: str, scores: Any) -> dict[str, Any]:
        """Write OUT/NAME.json and print the scores and a line for a table, in which `figure` stands; return the first.

        what: the evaluation, in words.
        """
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
            "processes": collectives.world(),
            "torch": torch.__version__,
        }
        if self.first:
            path = self.out / f"{name}.json"
            write_json(path, document)
            print(f"{what}: {scores}")
            print(f"| {' | '.join(cells)} |")
            self.say(f"written: {path}")
        return document


T = TypeVar("T", bound=Trial)
D = TypeVar("D", bound=Data)


def start(kind: type[T], args: argparse.Namespace, open_sets: Callable[[], tuple[D, D]]) -> T:
    """Return the trial of a command line. Raises InputError, on all processes, for what cannot work."""
    accelerator = build_accelerator(Settings(precision=args.precision, cpu=args.cpu, tracker="none", seed=args.seed))
    encoder = run_on_all_ranks(lambda: load_encoder(args.checkpoint, args.which, heads=args.heads))
    train, test = run_on_all_ranks(
        open_sets,
        lambda sets: {f"--{n}": s.fingerprint for n, s in zip(("train", "test"), sets, strict=True)},
    )
    trial = kind(args, accelerator, encoder, train, test, args.out or _beside(args.checkpoint))
    run_on_all_ranks(trial.check)
    warn_of_precision(args.precision, accelerator)
    trial.say(encoder.summary())
    for warning in encoder.warnings:
        trial.say(f"warning: {warning}")
    return trial


def share_of(data: Data) -> np.ndarray:
    """Return this process's share of a data set, int64 [n]: a run of neighbors, of sizes as even as can be."""
    return collectives.shares(np.arange(len(data)))[collectives.rank()]


def _beside(checkpoint: Path) -> Path:
    """Return the folder of results for a checkpoint: of the run that it is of, or beside the file."""
    path = checkpoint.resolve()
    for folder in (path, *path.parents[:2]):
        if (folder / "checkpoints").is_dir():
            return folder / "evaluation"
    return path.with_name(f"{path.name}.evaluation")
