"""A training run built from its settings, or refused."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import nn

from engine.config import Settings
from engine.evaluate import Knn
from engine.monitor import Monitor
from engine.optim import build_optimiser
from engine.step import Step
from methods.encoders import place
from methods.moco import MoCo
from methods.momentum import momentum_copy
from methods.queue import KeyQueue
from methods.registry import build_encoder
from pipeline.backends.ffcv import available_cores
from pipeline.beton import Beton
from pipeline.errors import InputError
from pipeline.loader import Loader
from pipeline.views import AUGMENTATIONS


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

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.settings.optim.epochs * self.loader.steps

    @property
    def backbone(self) -> nn.Module:
        """The online backbone."""
        return self.accelerator.unwrap_model(self.online).backbone


def build(settings: Settings) -> Run:
    """Build a run from its settings. Raises InputError for what cannot work, before anything is written."""
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
    online: nn.Module = build_encoder(method.name, model.arch, model.stem, model.width, model.dim, model.bn)
    target = place(momentum_copy(online), accelerator.device)
    if model.bn == "sync" and accelerator.num_processes > 1:
        online = nn.SyncBatchNorm.convert_sync_batchnorm(online)
    online = place(online, accelerator.device)
    queue = KeyQueue(method.queue, model.dim, settings.seed).to(accelerator.device)
    online, optimiser = accelerator.prepare(online, build_optimiser(online, settings.optim))
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
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        settings.write(out / "config.yaml")
    if settings.tracker != "none":
        accelerator.init_trackers(settings.tracker)
    monitor = Monitor(accelerator, out, settings.optim.epochs * loader.steps, settings.optim.epochs)
    return Run(settings, accelerator, loader, online, target, queue, optimiser, step, monitor, knn, out)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Accelerator(
            cpu=settings.cpu or not on_gpu,
            mixed_precision=settings.precision,
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_dir=settings.out,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )


def _loading(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    data = settings.data
    processes = max(1, int(getattr(accelerator.state, "local_world_size", 0) or accelerator.num_processes))
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
