"""The training run: built from its settings, then a loop that reads from top to bottom."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import nn

from engine import checkpoint
from engine.config import Settings
from engine.evaluate import Knn
from engine.monitor import Monitor
from engine.optim import build_optimiser, learning_rate
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


def train(settings: Settings) -> dict[str, Any]:
    """Train as `settings` say; return what `OUT/summary.json` says."""
    run = build(settings)
    try:
        restore(run)
        run.monitor.start(run.done)
        _epochs(run)
        return _summarise(run)
    finally:
        run.monitor.close()
        run.loader.close()
        run.accelerator.end_training()


def _epochs(run: Run) -> None:
    settings, steps = run.settings, run.loader.steps
    for epoch in range(run.done // steps, settings.optim.epochs):
        for batch in run.loader:
            lr = learning_rate(settings.optim, run.done, steps)
            for group in run.optimiser.param_groups:
                group["lr"] = lr
            parts = run.step(batch.views, run.done)
            run.done += 1
            run.monitor.add(parts, settings.data.batch, batch.waited)
            ends = run.done % steps == 0
            if run.done % settings.log_every == 0 or ends:
                run.monitor.log(run.done, run.done / steps, lr=lr, momentum=settings.method.momentum)
            if settings.save_every and run.done % settings.save_every == 0 and not ends:
                save(run)
        evaluate(run, epoch + 1)
        if not settings.save_every or run.done % settings.save_every == 0 or run.done == run.total:
            save(run)


def measure_rate(settings: Settings, steps: int = 8) -> float:
    """Return pairs a second of such a run on this machine, over a few steps after as many to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(replace(settings, out=folder, tracker="none"))
        try:
            batches = (batch for _ in range(2 * steps) for batch in run.loader)
            for number, batch in enumerate(itertools.islice(batches, 2 * steps)):
                if number == steps:
                    start = _now(run.accelerator)
                run.step(batch.views, number)
            return steps * settings.data.batch / (_now(run.accelerator) - start)
        finally:
            run.loader.close()
            run.accelerator.free_memory()


def _now(accelerator: Accelerator) -> float:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def evaluate(run: Run, epoch: int) -> None:
    """Evaluate after `epoch` epochs, where the settings ask for it."""
    every, last = run.settings.knn.every, epoch == run.settings.optim.epochs
    if run.knn is None or not every or (epoch % every and not last):
        return
    with run.monitor.pause():
        if run.accelerator.is_main_process:
            top1 = run.knn.top1(run.backbone, run.accelerator.autocast)
            run.monitor.evaluation(run.done, epoch, knn_top1=top1)
        run.accelerator.wait_for_everyone()


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


def save(run: Run) -> None:
    """Write a checkpoint of the run as it stands."""
    state = {
        "loader": run.loader.state_dict(),
        "queue_position": run.queue.position,
        "monitor": run.monitor.state_dict(),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        "settings": run.settings.as_dict(),
    }
    if run.accelerator.is_main_process:
        with run.monitor.pause():
            tensors = {"model": _modules(run).state_dict(), "optimiser": _optimiser_tensors(run)}
            checkpoint.save(run.out / "checkpoints", run.done, tensors, state, run.settings.keep)
    run.accelerator.wait_for_everyone()


def restore(run: Run) -> None:
    """Take up the checkpoint that `resume` names, exactly. With `auto` and none there, begin anew."""
    path = _to_resume(run)
    if path is None:
        return
    tensors, state = checkpoint.load(path)
    _modules(run).load_state_dict(tensors["model"])
    _load_optimiser(run, tensors["optimiser"])
    run.loader.load_state_dict(state["loader"])
    run.queue.position = state["queue_position"]
    run.monitor.load_state_dict(state["monitor"])
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.done = state["step"]
    if run.accelerator.is_main_process:
        print(f"resumed from {path}", file=sys.stderr)


def _to_resume(run: Run) -> Path | None:
    folder = run.out / "checkpoints"
    if run.settings.resume == "auto":
        path, broken = checkpoint.newest(folder)
        if run.accelerator.is_main_process:
            for problem in broken:
                print(f"warning: passed over: {problem}", file=sys.stderr)
        return path
    if run.settings.resume:
        return Path(run.settings.resume)
    if any(folder.glob("step_*")):
        raise InputError(f"{run.out}: already holds a run: add --resume auto to go on with it, or choose another --out")
    return None


def _modules(run: Run) -> nn.ModuleDict:
    online = run.accelerator.unwrap_model(run.online)
    return nn.ModuleDict({"online": online, "target": run.target, "queue": run.queue})


def _named_states(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """Return the optimiser's state of each parameter, by the parameter's name."""
    names = {id(p): name for name, p in run.accelerator.unwrap_model(run.online).named_parameters()}
    return {names[id(p)]: state for p, state in run.optimiser.state.items()}


def _optimiser_tensors(run: Run) -> dict[str, torch.Tensor]:
    states = _named_states(run)
    return {
        f"{name}|{key}": value for name, state in states.items() for key, value in state.items() if value is not None
    }


def _load_optimiser(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(run.accelerator.unwrap_model(run.online).named_parameters())
    for name, value in tensors.items():
        parameter, key = name.split("|")
        like = parameters[parameter]
        run.optimiser.state[like][key] = torch.empty_like(like).copy_(value)


def _summarise(run: Run) -> dict[str, Any]:
    monitor = run.monitor
    summary = {
        **monitor.last,
        "pairs_per_second": round(monitor.pairs / monitor.seconds, 1) if monitor.seconds else None,
        "data_wait_fraction": round(monitor.waited / monitor.seconds, 4) if monitor.seconds else None,
        "training_seconds": round(monitor.seconds, 1),
        "processes": run.accelerator.num_processes,
        "device": torch.cuda.get_device_name() if run.accelerator.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if run.accelerator.is_main_process:
        (run.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary
