"""A training run built from its settings, or refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from torch import nn

from engine.checkpoint import compatibility, storage
from engine.config.settings import VITS, Settings
from engine.evaluate.online_knn import Knn
from engine.fault_tolerance.preemption import Requests
from engine.fault_tolerance.watchdog import Watchdog
from engine.monitoring.metrics_logger import Monitor
from engine.parallel import collectives
from engine.parallel.accelerator import DTYPES, build_accelerator, warn_of_precision
from engine.parallel.consensus import from_all, together
from engine.parallel.rendezvous import processes_here, rank
from engine.training.datasets import build_knn, loading, open_sets, verify_sets
from engine.training.model import Model, build_model, check_compiler, needed_views
from methods.encoders import base_channels
from methods.norm import GROUPS, SHUFFLED
from pipeline.backends.select_backend import Choice, agreed, choose
from pipeline.beton import Beton
from pipeline.loader import Loader, Shuffle
from pipeline.sampling.order import steps_per_epoch
from pipeline.system.errors import InputError
from pipeline.views import AUGMENTATIONS

_CHANNELS, _LARGE = 16, 64  # fewer, on a CPU, at so many pixels are warned of


@dataclass
class Run:
    """Everything a run consists of."""

    settings: Settings
    accelerator: Accelerator
    loader: Loader
    backend: Choice
    model: Model
    monitor: Monitor
    knn: Knn | None
    out: Path
    writer: storage.Writer
    requests: Requests
    watchdog: Watchdog
    done: int = 0
    """Steps trained."""
    evaluated: int = 0
    """Epochs after which was evaluated, or nothing was to be."""
    evaluated_on: str = ""
    """Fingerprint of the images that kNN has classified so far; none: it has not been run."""
    lock: IO[str] | None = None
    """Held on the run folder while this is there."""

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.settings.optim.epochs * self.loader.steps

    @property
    def backbone(self) -> nn.Module:
        """The online backbone."""
        return self.accelerator.unwrap_model(self.model.online).backbone

    def close(self) -> None:
        """Wait for the checkpoint under way, and end what runs beside the training."""
        self.writer.wait()
        self.watchdog.close()
        self.monitor.close()
        self.loader.close()
        if self.lock is not None:
            self.lock.close()


def build(settings: Settings) -> Run:
    """Build a run from its settings, writing nothing. Raises InputError, on all processes, for what cannot work.

    What takes seconds to find wrong is found first: the records are verified, where that is asked for, after all else.
    """
    accelerator = build_accelerator(settings)
    together(lambda: _check(settings, accelerator))
    train_set, eval_set = open_sets(settings)
    together(lambda: _check_samples(settings, train_set, accelerator))
    knn = together(lambda: build_knn(settings, train_set, eval_set, accelerator) if eval_set else None)
    images = train_set.fingerprint, knn.fingerprint if knn else None
    together(lambda: compatibility.check(settings, *images) if rank() == 0 else None)
    warn_of_precision(settings.precision, accelerator)
    backend = _backend(settings, train_set, accelerator)
    model = build_model(settings, accelerator, steps_per_epoch(len(train_set), settings.data.batch))
    verify_sets(settings, train_set, eval_set)
    loader = together(lambda: _loader(settings, train_set, accelerator, backend.name))
    out = Path(settings.out)
    monitor = Monitor(accelerator, out, settings.optim.epochs * loader.steps, settings.optim.epochs)
    writer = storage.Writer(out / "checkpoints", settings.keep, settings.keep_every)
    requests, watchdog = Requests(accelerator.device), Watchdog(settings.step_timeout)
    return Run(settings, accelerator, loader, backend, model, monitor, knn, out, writer, requests, watchdog)


def _backend(settings: Settings, train_set: Beton, accelerator: Accelerator) -> Choice:
    """Return the backend that all processes take."""
    data = settings.data
    shares = {"processes": processes_here(), "cores": loading(settings, accelerator)["workers"]}
    wanted = from_all(lambda: choose(data.backend, train_set, accelerator.device, **shares))
    return agreed([Choice(*choice) for choice in wanted])


def _loader(settings: Settings, train_set: Beton, accelerator: Accelerator, backend: str) -> Loader:
    """Return the loader of this process's views."""
    data = settings.data
    return Loader(
        train_set,
        AUGMENTATIONS[data.augmentation],
        batch=data.batch,
        seed=settings.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        prefetch_factor=data.prefetch_factor,
        shuffle=_shuffle(settings, accelerator.num_processes),
        backend=backend,
        order=data.order,
        dtype=DTYPES[accelerator.mixed_precision],
        **{**loading(settings, accelerator), "size": settings.size_of_epochs},
    )


def _shuffle(settings: Settings, world: int) -> Shuffle | None:
    """Return how the keys' views are shuffled, where BatchNorm is to meet other samples in them than in the queries."""
    if settings.model.bn not in SHUFFLED:
        return None
    queries, keys = (needed_views(settings, kinds) for kinds in ("qQ", "kK"))
    parts = 1 if settings.model.bn == "shuffle" else world
    return Shuffle(tuple(sorted(keys)), collectives.exchange, parts, only=tuple(sorted(keys - queries)))


def _check(settings: Settings, accelerator: Accelerator) -> None:
    """Refuse what cannot work with any data."""
    check_batch(settings, accelerator)
    if settings.compile:
        check_compiler(accelerator.device)
    _warn_of_few_channels(settings, accelerator)


def _warn_of_few_channels(settings: Settings, accelerator: Accelerator) -> None:
    """Warn of convolutions of 4 and 8 channels at 64 pixels: PyTorch 2.13 was seen to overrun memory there on CPUs."""
    model, side = settings.model, max(settings.data.sizes or [settings.data.size])
    few = model.arch not in VITS and base_channels(model.width) < _CHANNELS
    if few and side >= _LARGE and accelerator.device.type == "cpu" and accelerator.is_main_process:
        print(
            f"warning: model.width {model.width} at {side} pixels: on CPUs PyTorch may corrupt memory in convolutions "
            f"of so few channels: choose {_CHANNELS / 64:g} or more",
            file=sys.stderr,
        )


def _check_samples(settings: Settings, train_set: Beton, accelerator: Accelerator) -> None:
    """Refuse a batch of more samples than there are, and warn of such a queue."""
    batch, samples = settings.data.batch, len(train_set)
    if batch > samples:
        raise InputError(
            f"{train_set.path}: a batch of {batch} from {samples} samples: choose data.batch from 1 to {samples}"
        )
    if (settings.method.queue_size or 0) > samples and accelerator.is_main_process:
        print(
            f"warning: method.queue_size {settings.method.queue_size} is larger than the data set's {samples} images, "
            f"so that a sample meets its own older keys as negatives: choose at most {samples // 2}",
            file=sys.stderr,
        )


def check_batch(settings: Settings, accelerator: Accelerator) -> None:
    """Refuse a batch that does not divide into its parts, and warn of BatchNorm's that are not what they should be."""
    batch, world = settings.data.batch, accelerator.num_processes
    if batch % world:
        raise InputError(f"data.batch {batch}: does not divide among {world} processes: choose a multiple of {world}")
    local, accumulate = batch // world, settings.parts(world)
    if local % accumulate or local // accumulate < 2:
        key, value = (
            ("micro_batch", settings.micro_batch)
            if settings.micro_batch
            else ("gradient_accumulation_steps", accumulate)
        )
        raise InputError(
            f"{key} {value}: does not divide the {local} samples a process has of a batch into equal parts of two or "
            "more: choose another number"
        )
    parts = GROUPS * world if settings.model.bn == "split" else max(GROUPS, world)
    if settings.model.bn in SHUFFLED and batch % parts and accelerator.is_main_process:
        print(
            f"warning: data.batch {batch} does not divide into the {parts} parts of model.bn {settings.model.bn}, so "
            f"that BatchNorm sees fewer and larger ones: choose a multiple of {2 * parts}",
            file=sys.stderr,
        )
