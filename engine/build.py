"""A training run built from its settings, or refused."""

from __future__ import annotations

import fcntl
import os
import sys
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import is_wandb_available, set_seed
from torch import nn

from engine.config import Settings
from engine.evaluate import Knn
from engine.monitor import Monitor
from engine.optim import build_optimiser
from engine.step import Step
from methods.encoders import place
from methods.moco import MoCo
from methods.momentum import momentum_copy
from methods.norm import GROUPS
from methods.queue import KeyQueue
from methods.registry import build_encoder
from pipeline.beton import Beton
from pipeline.cores import available_cores
from pipeline.errors import InputError
from pipeline.loader import Loader
from pipeline.views import AUGMENTATIONS

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the first process evaluates and saves while the others wait


@dataclass
class Run:
    """Everything a run consists of."""

    settings: Settings
    accelerator: Accelerator
    loader: Loader
    online: nn.Module
    """As Accelerate wrapped it."""
    target: nn.Module
    queue: KeyQueue
    optimiser: Any
    step: Step
    monitor: Monitor
    knn: Knn | None
    out: Path
    done: int = 0
    """Steps trained."""
    lock: IO[str] | None = None
    """Held on the run folder while this is there."""

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.settings.optim.epochs * self.loader.steps

    @property
    def backbone(self) -> nn.Module:
        """The online backbone."""
        return self.accelerator.unwrap_model(self.online).backbone


def build(settings: Settings) -> Run:
    """Build a run from its settings, writing nothing. Raises InputError for what cannot work."""
    train_set = _open(settings.data.train, "data.train")
    accelerator = _accelerator(settings)
    set_seed(settings.seed)
    loader = Loader(
        train_set,
        AUGMENTATIONS[settings.data.augmentation],
        batch=settings.data.batch,
        seed=settings.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        ahead=settings.data.ahead,
        **_loading(settings, accelerator),
    )
    _check(settings, len(train_set), accelerator)
    model, method = settings.model, settings.method
    groups = max(1, GROUPS // accelerator.num_processes)
    online: nn.Module = build_encoder(method.name, model.arch, model.stem, model.width, model.dim, model.bn, groups)
    if model.bn == "sync" and accelerator.num_processes > 1:
        online = nn.SyncBatchNorm.convert_sync_batchnorm(online)
    target = place(momentum_copy(online), accelerator.device)
    online = place(online, accelerator.device)
    queue = KeyQueue(method.queue, model.dim, settings.seed).to(accelerator.device)
    online, optimiser = accelerator.prepare(
        online, build_optimiser(online, settings.optim, fused=settings.precision != "fp16")
    )
    step = Step(
        accelerator,
        online,
        target,
        queue,
        MoCo(method.temperature, method.symmetric),
        optimiser,
        ema=method.momentum,
        accumulate=settings.accumulate,
        shuffle_keys=model.bn == "split",
        seed=settings.seed,
    )
    knn = _knn(settings, train_set, accelerator)
    out = Path(settings.out)
    monitor = Monitor(accelerator, out, settings.optim.epochs * loader.steps, settings.optim.epochs)
    return Run(settings, accelerator, loader, online, target, queue, optimiser, step, monitor, knn, out)


def begin(run: Run) -> None:
    """Make the run folder and start the trackers. Raises InputError where the folder cannot be made."""
    settings = run.settings
    if run.accelerator.is_main_process:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
            run.lock = _lock(run.out)
            replace(settings, resume="").write(run.out / "config.yaml")
        except OSError as error:
            raise InputError(f"out {settings.out!r}: {error.strerror or error}: choose another folder") from None
    if settings.tracker != "none":
        run.accelerator.init_trackers("millrace")


def _lock(out: Path) -> IO[str]:
    """Return a file whose lock keeps a second run out of the folder; the system releases it with the process."""
    file = open(out / ".lock", "w")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{out}: another run is writing into it: choose another --out, or end that run") from None
    return file


def _open(path: str, key: str) -> Beton:
    if not path:
        raise InputError(f"{key} is not set: give a beton, --{key} F.beton; write one with python -m pipeline.prepare")
    return Beton(path)


def _accelerator(settings: Settings) -> Accelerator:
    on_gpu = torch.cuda.is_available() and not settings.cpu
    if settings.precision == "fp16" and not on_gpu:
        raise InputError("precision 'fp16': needs a GPU: choose bf16 or no")
    if settings.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise InputError("precision 'bf16': this GPU does not have it: choose fp16 or no")
    if settings.tracker == "wandb" and not is_wandb_available():
        raise InputError("tracker 'wandb': the package is not installed: pip install wandb, or choose tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Accelerator(
            cpu=settings.cpu or not on_gpu,
            mixed_precision=settings.precision,
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_dir=settings.out,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
            ],
        )


def _loading(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    data = settings.data
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return {
        "size": data.size,
        "device": accelerator.device,
        "backend": data.backend,
        "workers": data.workers or max(1, available_cores() // processes),
        "stall_timeout": data.stall_timeout,
    }


def _check(settings: Settings, samples: int, accelerator: Accelerator) -> None:
    """Refuse what cannot work, and warn of what hardly will."""
    local = settings.data.batch // accelerator.num_processes
    if local % settings.accumulate or local // settings.accumulate < 2:
        raise InputError(
            f"accumulate {settings.accumulate}: does not divide the {local} samples a process has of a batch "
            "into equal parts of two or more: choose another number"
        )
    if settings.model.bn == "sync" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise InputError("model.bn 'sync': needs GPUs: choose split or plain for several processes on the CPU")
    if settings.method.queue > samples and accelerator.is_main_process:
        print(
            f"warning: method.queue {settings.method.queue} is larger than the data set's {samples} images, so that "
            f"a sample meets its own older keys as negatives: choose at most {samples // 2}",
            file=sys.stderr,
        )


def _knn(settings: Settings, train_set: Beton, accelerator: Accelerator) -> Knn | None:
    if not settings.data.eval or not settings.knn.every:
        return None
    knn = settings.knn
    return Knn(
        train_set,
        _open(settings.data.eval, "data.eval"),
        k=knn.k,
        temperature=knn.temperature,
        limit=knn.limit,
        batch=max(256, settings.data.batch),
        share=settings.data.eval_share,
        **_loading(settings, accelerator),
    )
