"""Evaluation of an encoder on a training and a test set, and its result file."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from engine.config.settings import Settings
from engine.evaluate.accuracy import Scores
from engine.parallel import collectives
from engine.parallel.accelerator import build_accelerator, warn_of_precision
from engine.parallel.consensus import run_on_all_ranks
from engine.parallel.rendezvous import cores_per_rank
from engine.weights.load import LoadedEncoder, digest, load_encoder
from methods.encoders import place
from methods.registry import Backbone
from pipeline.system.errors import InputError, RunFailed
from pipeline.system.files import write_json
from pipeline.system.progress import progress

logger = get_logger(__name__)


class ImageSet(Protocol):
    """A set of images."""

    @property
    def path(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


@dataclass
class Evaluation:
    """An encoder, its training and test set, and the folder of results. Places the backbone on the device."""

    args: argparse.Namespace
    accelerator: Accelerator
    encoder: LoadedEncoder
    train: ImageSet
    test: ImageSet
    out: Path
    began: float = field(init=False, default_factory=time.perf_counter)
    training_seconds: float | None = field(init=False, default=None)
    fingerprint: str = field(init=False)
    """Digest of the backbone as loaded."""

    def __post_init__(self) -> None:
        self.fingerprint = digest(self.encoder.backbone)
        place(self.backbone, self.device)

    @property
    def backbone(self) -> Backbone:
        """The backbone, on the device."""
        return self.encoder.backbone

    @property
    def device(self) -> torch.device:
        """The device of all computation."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return collectives.rank() == 0

    @property
    def workers(self) -> int:
        """Threads of this rank that load images."""
        return self.args.workers or cores_per_rank()

    @property
    def sharding(self) -> dict[str, int]:
        """Rank, world size and threads: arguments of the loaders."""
        return {"rank": collectives.rank(), "world": collectives.world(), "workers": self.workers}

    def gather(self, local: torch.Tensor, data: ImageSet) -> torch.Tensor:
        """Return the rows of all ranks' shards of a data set, in order."""
        return collectives.gather_uneven(local, list(map(len, collectives.shares(np.arange(len(data))))))

    def progress(self, items: Any, unit: str) -> Any:
        """Yield the items, with a progress bar on rank 0."""
        return progress(items, unit, quiet=not self.is_main)

    def check(self) -> None:
        """Create the folder of results. Raises InputError for it or for other options that cannot work."""
        if self.args.batch is not None and self.args.batch < 1:
            raise InputError(f"--batch {self.args.batch}: choose 1 or more")
        if len(self.test) < collectives.world():
            raise InputError(f"{self.test.path}: {len(self.test)} images for {collectives.world()} ranks: start fewer")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be created ({error.strerror})"
            raise InputError(f"--out {self.out}: {problem}: choose another folder") from None

    def require_positive(self, *names: str) -> None:
        """Raise InputError for an option that is given and not a finite number above 0."""
        for name in names:
            value = getattr(self.args, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: choose a number above 0")

    def check_frozen(self) -> None:
        """Raise RunFailed unless the backbone is bit for bit as loaded."""
        if digest(self.backbone) != self.fingerprint:
            raise RunFailed("the backbone changed during its evaluation: the result would be invalid")

    def settings(self, **options: Any) -> dict[str, Any]:
        """Return all settings that affect the result, as plain JSON values."""
        return {
            "encoder": self.fingerprint,
            "train": self.train.fingerprint,
            "test": self.test.fingerprint,
            **{name: list(values) for name, values in self.encoder.statistics._asdict().items()},
            "precision": self.accelerator.mixed_precision,
            "seed": self.args.seed,
            **options,
        }

    def write(self, name: str, title: str, scores: Scores, settings: dict[str, Any], **more: Any) -> None:
        """Write OUT/NAME.json with the scores and `more`; print the scores, and a Markdown table of one row.

        title: the evaluation, in words. settings: all that affect the result.
        """
        if not self.is_main:
            return
        encoder, seconds = self.encoder, time.perf_counter() - self.began
        trained = {} if self.training_seconds is None else {"training_seconds": round(self.training_seconds, 2)}
        document = {
            "evaluation": title,
            "checkpoint": str(encoder.path),
            "which": encoder.which,
            "architecture": str(encoder.architecture),
            "train": str(self.train.path),
            "test": str(self.test.path),
            **asdict(scores),
            **trained,
            **more,
            "settings": settings,
            "seconds": round(seconds, 2),
            "device": str(self.device),
            "world_size": collectives.world(),
            "torch": torch.__version__,
        }
        path = self.out / f"{name}.json"
        write_json(path, document)
        print(f"{title}: {scores}")
        print(f"| encoder | architecture | evaluation | {scores.MAIN}, % | time |\n|---|---|---|---|---|")
        main = f"{100 * getattr(scores, scores.MAIN):.2f}"
        print(f"| {encoder.path.name} {encoder.which} | {encoder.architecture} | {title} | {main} | {seconds:.0f} s |")
        logger.info("written: %s", path)


E = TypeVar("E", bound=Evaluation)
S = TypeVar("S", bound=ImageSet)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every evaluation."""
    parser.add_argument("checkpoint", type=Path, help="run or checkpoint folder, .safetensors, .pth, .pth.tar")
    parser.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    parser.add_argument(
        "--heads", type=int, default=0, help="attention heads of a transformer whose file lacks their number"
    )
    parser.add_argument("--prefix", default="", help="of the backbone's keys, in a file of no known kind")
    parser.add_argument(
        "--trust-recipe", action="store_true", help="import the code that a run names as its model.arch"
    )
    parser.add_argument("--batch", type=int, help="global batch, images")
    parser.add_argument(
        "--precision", choices=["no", "bf16", "fp16"], default="bf16", help="autocast precision of the backbone"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader threads of each rank (default: its cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=False, help="do not use the GPU")
    parser.add_argument("--out", type=Path, help="folder of results (default: RUN/evaluation, or FILE.evaluation)")


def build(kind: type[E], args: argparse.Namespace, open_sets: Callable[[], tuple[S, S]]) -> E:
    """Return the evaluation of a command line; `open_sets` returns training and test set.

    Raises InputError, on all ranks, for options that cannot work.
    """
    accelerator = build_accelerator(Settings(precision=args.precision, cpu=args.cpu, tracker="none", seed=args.seed))
    options = {"heads": args.heads, "prefix": args.prefix, "trust_recipe": args.trust_recipe}
    encoder = run_on_all_ranks(lambda: load_encoder(args.checkpoint, args.which, **options))
    train, test = run_on_all_ranks(
        open_sets,
        lambda sets: {f"--{n}": s.fingerprint for n, s in zip(("train", "test"), sets, strict=True)},
    )
    evaluation = kind(args, accelerator, encoder, train, test, args.out or _default_folder(args.checkpoint))
    run_on_all_ranks(evaluation.check)
    warn_of_precision(args.precision, accelerator)
    logger.info("%s", encoder.summary())
    for warning in encoder.warnings:
        logger.warning("%s", warning)
    return evaluation


def shard(data: ImageSet) -> np.ndarray:
    """Return this rank's shard of a data set: consecutive indices, int64 [n], of sizes as even as possible."""
    return collectives.shares(np.arange(len(data)))[collectives.rank()]


def _default_folder(checkpoint: Path) -> Path:
    """Return the folder of results for a checkpoint: in its run, or next to the file."""
    path = checkpoint.resolve()
    for folder in (path, *path.parents[:2]):
        if (folder / "checkpoints").is_dir():
            return folder / "evaluation"
    return path.with_name(f"{path.name}.evaluation")
