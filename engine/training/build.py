"""A training run built from its settings, or refused."""

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from engine.checkpoint import storage
from engine.config.cli import parse_command_line, shared
from engine.config.settings import Settings
from engine.fault_tolerance.preemption import Requests, follow_launcher
from engine.fault_tolerance.watchdog import Watchdog
from engine.monitoring.metrics_logger import MetricsLogger
from engine.monitoring.trackers import Trackers, check_trackers
from engine.parallel.accelerator import DeviceChoice, build_accelerator, choose_device, warn_of_precision
from engine.parallel.consensus import run_on_all_ranks
from engine.parallel.rendezvous import rank, world
from engine.training.datasets import Datasets, build_loader, open_datasets, verify_datasets
from engine.training.model import Model, build_model, check_compiler
from engine.training.probe import Probe
from engine.training.run_folder import RunFolder, check_out
from methods.encoders import RESNETS, base_channels
from methods.norm import GROUPS, SHUFFLED
from pipeline.loader import Loader
from pipeline.sampling.order import steps_per_epoch
from pipeline.system.errors import InputError

logger = get_logger(__name__)

_SAFE_CHANNELS, _LARGE_PIXELS = 16, 64  # warned of on a CPU: fewer channels with views of that size


@dataclass
class Run:
    """The parts of a run, and its position."""

    settings: Settings
    accelerator: Accelerator
    data: Datasets
    loader: Loader
    model: Model
    monitor: MetricsLogger
    folder: RunFolder
    writer: storage.Writer
    requests: Requests
    watchdog: Watchdog
    probe: Probe | None = None
    done: int = 0
    """Steps trained."""
    evaluated: int = 0
    """Epochs whose evaluation is finished or not due."""
    evaluated_on: str = ""
    """Fingerprint of the images that kNN has classified so far; empty: none."""
    started_from: dict[str, Any] = field(default_factory=dict)
    """Record of the weights that the run started from (`engine.weights.initialize`); empty: random ones."""

    @property
    def total(self) -> int:
        """Steps of the training."""
        return self.settings.optim.epochs * self.loader.steps

    @property
    def awaits_evaluation(self) -> bool:
        """Whether the run is at the end of an epoch whose evaluation is not finished."""
        epochs, steps = divmod(self.done, self.loader.steps)
        return self.evaluated < epochs and not steps

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.done >= self.total and not self.awaits_evaluation

    @property
    def backbone(self) -> nn.Module:
        """The online backbone."""
        return self.model.step.encoder.backbone

    def close(self) -> None:
        """Wait for a checkpoint that is being written, end all threads, and release the run folder."""
        self.writer.wait()
        self.watchdog.close()
        self.monitor.close()
        self.loader.close()
        self.folder.close()


class Launch(NamedTuple):
    """Settings, and the device to train on; None for a dry run, which has no need of that device."""

    settings: Settings
    device: DeviceChoice | None

    def facts(self) -> dict[str, Any]:
        """Return the values that must be the same on all ranks."""
        device = {} if self.device is None else self.device.facts()
        return {**shared(self.settings), "--dry-run": self.device is None, **device}


def agree_on_launch(settings: Settings | None = None) -> Launch:
    """Return the launch with these settings, by default the command line's, once all ranks have the same one.

    The first of four agreements before training. Raises InputError, on all ranks.
    """

    def check() -> Launch:
        chosen, dry_run = (settings, False) if settings else parse_command_line()
        if dry_run:
            return Launch(chosen, None)
        check_out(chosen)
        return Launch(chosen, check_launch(chosen))

    follow_launcher()  # checks and agreement may take long, and the launcher may be killed during them
    return run_on_all_ranks(check, Launch.facts)


def build(settings: Settings, device: DeviceChoice | None = None) -> Run:
    """Build a run, writing nothing. Raises InputError, on all ranks, for settings or data that cannot work.

    Checks that take seconds come first, the verification of all records last. device: that of `agree_on_launch`; by
    default the ranks agree here.
    """
    device = device or run_on_all_ranks(lambda: check_launch(settings), DeviceChoice.facts)
    accelerator = build_accelerator(settings, device)
    data = open_datasets(settings, accelerator.device)
    settings = data.settings
    for warning in list_warnings(settings, accelerator.device, len(data.train)):
        logger.warning(warning)
    warn_of_precision(settings.precision, accelerator)
    model = build_model(settings, accelerator, steps_per_epoch(len(data.train), settings.data.batch))
    verify_datasets(settings, data)
    loader = run_on_all_ranks(lambda: build_loader(settings, data, accelerator))
    probe = None
    if data.probe_labels is not None:
        features: Any = model.step.encoder.backbone.features
        probe = Probe(features, data.probe_labels, settings.probe.lr, accelerator.device)
    folder, epochs = RunFolder(settings), settings.optim.epochs
    trackers = Trackers(settings, folder.path)
    return Run(
        settings,
        accelerator,
        data,
        loader,
        model,
        MetricsLogger(accelerator, folder.path, epochs * loader.steps, epochs, trackers),
        folder,
        storage.Writer(folder.checkpoints, settings.keep, settings.keep_every),
        Requests(accelerator.device),
        Watchdog(settings.step_timeout),
        probe,
    )


def check_launch(settings: Settings) -> DeviceChoice:
    """Return this rank's device. Raises InputError for settings that cannot work on this machine with any data."""
    choice = choose_device(settings)
    check_batch(settings)
    if rank() == 0:
        check_trackers(settings)
    if settings.compile:
        check_compiler(torch.device("cuda" if choice.on_gpu else "cpu"))
    init = settings.model.init
    if init and not settings.resume and rank() == 0 and not os.path.exists(init):
        raise InputError(f"model.init {init}: no such file or folder: correct the path")
    return choice


def check_batch(settings: Settings) -> None:
    """Raise InputError for a batch that does not divide into the ranks' shares, or these into equal parts."""
    batch = settings.data.batch
    if batch % world():
        raise InputError(f"data.batch {batch}: does not divide among {world()} ranks: choose a multiple of {world()}")
    share, accumulate = batch // world(), settings.micro_batches(world())
    if share % accumulate or share // accumulate < 2:
        micro = settings.micro_batch
        key, value = ("micro_batch", micro) if micro else ("gradient_accumulation_steps", accumulate)
        raise InputError(
            f"{key} {value}: does not divide the {share} samples a rank has of a batch into equal parts of two or "
            "more: choose another number"
        )


def list_warnings(settings: Settings, device: torch.device, samples: int | None = None) -> list[str]:
    """Return warnings of settings that work, but not well; samples: images to train on, where they are known."""
    model, batch, queue = settings.model, settings.data.batch, settings.method.queue_size or 0
    warnings = []
    parts = GROUPS * world() if model.bn == "split" else max(GROUPS, world())
    if model.bn in SHUFFLED and batch % parts:
        warnings.append(
            f"data.batch {batch} does not divide into the {parts} parts of model.bn {model.bn}, so "
            f"that BatchNorm sees fewer and larger ones: choose a multiple of {2 * parts}"
        )
    # PyTorch 2.13 was seen to overrun memory on CPUs in convolutions of 4 and 8 channels at 64 pixels
    few = model.arch in RESNETS and base_channels(model.width) < _SAFE_CHANNELS
    side = max(settings.data.sizes or [settings.data.size])
    if few and side >= _LARGE_PIXELS and device.type == "cpu":
        warnings.append(
            f"model.width {model.width} at {side} pixels: on CPUs PyTorch may corrupt memory in convolutions "
            f"of so few channels: choose {_SAFE_CHANNELS / 64:g} or more"
        )
    if samples is not None and queue > samples:
        warnings.append(
            f"method.queue_size {queue} is larger than the data set's {samples} images, so that "
            f"a sample meets its own older keys as negatives: choose at most {samples // 2}"
        )
    return warnings
