"""A training run built from its settings, or refused."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from engine import changes, checkpoint, ranks
from engine.config import VITS, Settings
from engine.devices import DTYPES, build_accelerator, prepared, warn_of_precision
from engine.evaluate import Knn
from engine.inputs import build_knn, loading, open_sets, verify_sets
from engine.meeting import from_all, processes_here, rank, together
from engine.monitor import Monitor
from engine.optim import build_optimiser
from engine.preempt import Requests
from engine.schedule import Schedule
from engine.step import Step
from engine.sync_norm import synchronise
from engine.watchdog import Watchdog
from methods.encoders import base_channels, place
from methods.heads import Encoder
from methods.momentum import momentum_copy
from methods.norm import GROUPS, SHUFFLED
from methods.queue import KeyQueue
from methods.recompute import recompute
from methods.registry import build_backbone, build_encoder, build_objective
from pipeline.backends.select_backend import Choice, agreed, choose
from pipeline.beton import Beton
from pipeline.loader import Loader, Shuffle
from pipeline.sampling.order import steps_per_epoch
from pipeline.system.errors import InputError
from pipeline.system.packages import installed
from pipeline.views import AUGMENTATIONS

_CHANNELS, _LARGE = 16, 64  # fewer, on a CPU, at so many pixels are warned of


@dataclass
class Model:
    """What is trained, and the step that trains it."""

    online: nn.Module
    """As Accelerate wrapped it."""
    target: Encoder | None
    queue: KeyQueue | None
    optimiser: Any
    step: Step


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
    writer: checkpoint.Writer
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
    together(lambda: changes.check(settings, *images) if rank() == 0 else None)
    warn_of_precision(settings.precision, accelerator)
    backend = _backend(settings, train_set, accelerator)
    model = build_model(settings, accelerator, steps_per_epoch(len(train_set), settings.data.batch))
    verify_sets(settings, train_set, eval_set)
    loader = together(lambda: _loader(settings, train_set, accelerator, backend.name))
    out = Path(settings.out)
    monitor = Monitor(accelerator, out, settings.optim.epochs * loader.steps, settings.optim.epochs)
    writer = checkpoint.Writer(out / "checkpoints", settings.keep, settings.keep_every)
    requests, watchdog = Requests(accelerator.device), Watchdog(settings.step_timeout)
    return Run(settings, accelerator, loader, backend, model, monitor, knn, out, writer, requests, watchdog)


def _backend(settings: Settings, train_set: Beton, accelerator: Accelerator) -> Choice:
    """Return the backend that all processes take."""
    data = settings.data
    shares = {"processes": processes_here(), "cores": loading(settings, accelerator)["workers"]}
    wanted = from_all(lambda: choose(data.backend, data.crop_on, train_set, accelerator.device, **shares))
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
        ahead=data.ahead,
        shuffle=_shuffle(settings, accelerator.num_processes),
        backend=backend,
        order=data.order,
        dtype=DTYPES[accelerator.mixed_precision],
        **{**loading(settings, accelerator), "size": settings.size_of_epochs},
    )


def build_model(settings: Settings, accelerator: Accelerator, steps_an_epoch: int = 1) -> Model:
    """Build encoders, queue, objective, optimiser, schedules and step, weights from the settings' seed."""
    set_seed(settings.seed)
    base, device = settings.base, accelerator.device
    accumulate = settings.parts(accelerator.num_processes)
    online = _online(settings, accelerator, accumulate)
    if settings.model.bn == "sync" and accelerator.num_processes > 1:
        synchronise(online, device)
    target = place(momentum_copy(online), device) if base.teacher else None
    place(online, device)
    if settings.compile:
        _compile(online, target, device)
    queue = _queue(settings, device) if base.queue else None
    wrapped, optimiser = prepared(accelerator, online, build_optimiser(online, settings.optim))
    if settings.gradient_dtype == "bfloat16":
        _exchange_in_bfloat16(wrapped)
    step = Step(
        accelerator,
        wrapped,
        target,
        queue,
        build_objective(base, settings.terms),
        optimiser,
        Schedule(settings, steps_an_epoch, device),
        accumulate=accumulate,
        clip=settings.optim.clip,
        gradient_shares=settings.gradient_shares,
        graph=settings.cuda_graph,
    )
    return Model(wrapped, target, queue, optimiser, step)


def _online(settings: Settings, accelerator: Accelerator, accumulate: int) -> Encoder:
    """Return the online encoder, on the CPU; its BatchNorm's groups are those of a part of a process's batch."""
    model = settings.model
    assert model.dim is not None
    assert model.bn is not None
    parts = accelerator.num_processes * accumulate if model.bn == "shuffle" else accumulate
    groups = max(1, GROUPS // parts)
    backbone = build_backbone(
        model.arch,
        stem=model.stem,
        width=model.width,
        bn=model.bn,
        groups=groups,
        zero_init=bool(model.zero_init),
        size=settings.data.size,
        frozen_patch=model.frozen_patch,
    )
    if settings.recompute:
        recompute(backbone)
    return build_encoder(settings.base, backbone, dim=model.dim, hidden=model.hidden, bn=model.bn, groups=groups)


def _compile(online: Encoder, target: Encoder | None, device: torch.device) -> None:
    """Have torch.compile compile the backbones, once for each size of the views."""
    check_compiler(device)
    torch._dynamo.config.recompile_limit = 64  # one for each encoder and size of the views
    for encoder in (online, target):
        if encoder is not None:
            encoder.backbone.compile(dynamic=False)


def _queue(settings: Settings, device: torch.device) -> KeyQueue:
    method, dim = settings.method, settings.model.dim
    assert method.queue is not None
    assert dim is not None
    return KeyQueue(method.queue, dim, settings.seed, getattr(torch, method.queue_dtype)).to(device)


def _exchange_in_bfloat16(wrapped: nn.Module) -> None:
    """Have processes exchange gradients in bfloat16; say so where there is one alone, and nothing to exchange."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.register_comm_hook(None, lambda _, bucket: ranks.mean_in_bfloat16(bucket))
    else:
        print("warning: gradient_dtype bfloat16: there is one process, and nothing to exchange", file=sys.stderr)


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile has nothing to compile with."""
    if device.type == "cuda" and not installed("triton"):
        raise InputError("compile true: triton is not installed: pip install triton, or choose compile false")
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise InputError("compile true: there is no C++ compiler: install g++, or choose compile false")


def needed_views(settings: Settings, kinds: str = "qQkK") -> set[int]:
    """Return the indices of the views whose embeddings are needed, of those kinds."""
    needs = build_objective(settings.base, settings.terms).needs
    return {int(name[1]) - 1 for name in needs if name[0] in kinds}


def _shuffle(settings: Settings, world: int) -> Shuffle | None:
    """Return how the keys' views are shuffled, where BatchNorm is to meet other samples in them than in the queries."""
    if settings.model.bn not in SHUFFLED:
        return None
    queries, keys = (needed_views(settings, kinds) for kinds in ("qQ", "kK"))
    parts = 1 if settings.model.bn == "shuffle" else world
    return Shuffle(tuple(sorted(keys)), ranks.exchange, parts, only=tuple(sorted(keys - queries)))


def begin(run: Run) -> None:
    """Make the run folder and start the trackers. Raises InputError where the folder cannot be made."""
    settings = run.settings
    if run.accelerator.is_main_process:
        try:
            claim(run)
            replace(settings, resume="", allow_change=[]).write(run.out / "config.yaml")
        except OSError as error:
            raise InputError(f"out {settings.out!r}: {error.strerror or error}: choose another folder") from None
        print(f"data.backend: {run.backend.name} ({run.backend.why})", file=sys.stderr)
        if settings.compile:
            print("compile: the first steps, and those of each new size, take a minute or more", file=sys.stderr)
    if settings.tracker != "none":
        run.accelerator.init_trackers("millrace")


def claim(run: Run) -> None:
    """Make the run folder, keep other runs out of it, and clear up what one that was killed left there."""
    if run.lock is None:
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = _lock(run.out)
        checkpoint.clear_up(run.out / "checkpoints")


def _lock(out: Path) -> IO[str]:
    """Return a file whose lock keeps a second run out of the folder; the system releases it with the process."""
    file = open(out / ".lock", "w")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{out}: another run is writing into it: choose another --out, or end that run") from None
    return file


def check_out(settings: Settings) -> None:
    """Raise InputError, on the first process, where the run folder cannot be written, or another run has it."""
    if rank():
        return
    out = Path(settings.out)
    try:
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        problem = 0 if there.is_dir() else errno.ENOTDIR
        if not problem and not os.access(there, os.W_OK | os.X_OK):
            problem = errno.EACCES
        if (out / ".lock").exists():
            _lock(out).close()
    except OSError as error:
        problem = error.errno or errno.EINVAL
    if problem:
        raise InputError(f"out {settings.out!r}: {os.strerror(problem)}: choose another folder")
    if not settings.resume and any((out / "checkpoints").glob("step_*")):
        raise InputError(f"{out}: already holds a run: add --resume auto to go on with it, or choose another --out")


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
    if (settings.method.queue or 0) > samples and accelerator.is_main_process:
        print(
            f"warning: method.queue {settings.method.queue} is larger than the data set's {samples} images, so that "
            f"a sample meets its own older keys as negatives: choose at most {samples // 2}",
            file=sys.stderr,
        )


def check_batch(settings: Settings, accelerator: Accelerator) -> None:
    """Refuse a batch that does not divide into its parts, and warn of BatchNorm's that are not what they should be."""
    batch, world = settings.data.batch, accelerator.num_processes
    if batch % world:
        raise InputError(f"data.batch {batch}: does not divide among {world} processes: choose a multiple of {world}")
    local, accumulate = batch // world, settings.parts(world)
    if local % accumulate or local // accumulate < 2:
        key, value = ("micro_batch", settings.micro_batch) if settings.micro_batch else ("accumulate", accumulate)
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
