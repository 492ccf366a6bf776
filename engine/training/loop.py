"""The training loop, from top to bottom."""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed

from engine.config.settings import Settings
from engine.fault_tolerance.diagnosis import translate_failures
from engine.fault_tolerance.heartbeat import Heartbeat
from engine.fault_tolerance.preemption import Stopped
from engine.monitoring.callback import Callback
from engine.parallel.accelerator import DeviceChoice, untuned_convolutions
from engine.parallel.batchnorm_stats import RunningStatistics
from engine.parallel.consensus import run_on_all_ranks
from engine.parallel.rendezvous import rank, world
from engine.training.build import Run, agree_on_launch, build
from engine.training.pictures import log_curves, log_views
from engine.training.resume import raise_if_diverged, restore, save
from methods.custom import is_custom
from pipeline.loader import Batch
from pipeline.system.counter_rng import keyed
from pipeline.system.files import write_json
from pipeline.system.limits import read_json
from pipeline.system.text import counted

logger = get_logger(__name__)

_SUMMARY_BYTES = 1 << 20
_DRAWS = 0x6472617773  # key of a random stream, apart from other modules'


def train(
    settings: Settings, device: DeviceChoice | None = None, *, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Train by `settings`; return the contents of `OUT/summary.json`.

    device: that of `agree_on_launch`; by default the ranks agree here. callbacks: called with the metrics. Raises
    InputError, on all ranks, for settings or data that cannot work, Stopped after a stop request, Diverged, and
    LostRank or another RunFailed; a stalled loader or a lost rank prints the stack of every thread first.
    """
    if device is None:
        settings, device = agree_on_launch(settings)
    with contextlib.ExitStack() as stack:
        heartbeat = stack.enter_context(contextlib.closing(Heartbeat(settings.collective_timeout)))
        with translate_failures(heartbeat):
            run = build(settings, device)
            run.monitor.callbacks = callbacks
            stack.enter_context(run.requests.handle_signals())  # until another rank's failure is diagnosed, too
            stack.callback(run.close)
            return _train(run, heartbeat)


def _train(run: Run, heartbeat: Heartbeat) -> dict[str, Any]:
    restore(run)
    if run.finished:
        return _log_finished(run)
    _log_start(run)
    if not run.done:
        log_views(run)
    stopped = _train_epochs(run, heartbeat)
    run_on_all_ranks(run.writer.finish)
    summary = {} if stopped else _summarize(run)
    if not stopped:
        log_curves(run)
    run.monitor.finish()
    run.accelerator.end_training()  # not after a failure: it waits for all ranks
    if stopped:
        raise stopped
    _print_result(run)
    return summary


def _log_start(run: Run) -> None:
    settings, device = run.settings, run.accelerator.device.type
    length = f"{counted(run.total, 'step')} ({counted(settings.optim.epochs, 'epoch')}), batch {settings.data.batch}"
    where = f"on {device}" if world() == 1 else f"on {world()} ranks, {device}"
    logger.info(f"{settings.objective}, {settings.model.arch}: {length}, {where}, run folder {run.folder.path}")
    if settings.compile and device == "cpu":
        logger.info("compile takes minutes on a CPU; no step is logged until then")


def _train_epochs(run: Run, heartbeat: Heartbeat) -> Stopped | None:
    """Train until the last epoch, or until a stop request has been saved."""
    settings, steps = run.settings, run.loader.steps
    heartbeat.step = run.done
    # With auto, the newest checkpoint contains this very state: no need to save it again before the evaluation.
    if run.awaits_evaluation and (stopped := _end_epoch(run, run.done // steps, saved=settings.resume == "auto")):
        return stopped
    for epoch in range(run.done // steps, settings.optim.epochs):
        for batch in run.loader:
            last = (run.done + 1) % steps == 0
            train_on(run, batch, logs=last or (run.done + 1) % settings.log_every == 0)
            heartbeat.step = run.done
            run.watchdog.beat(run.done)
            # Only evaluation and save follow the last step; the evaluation polls for stop requests by itself.
            stopped = run.requests.poll_stop(run.done) if run.done < run.total else None
            if stopped or (settings.save_every and run.done % settings.save_every == 0 and not last):
                save(run)
            if stopped:
                return stopped
        if stopped := _end_epoch(run, epoch + 1):
            return stopped
    return None


def train_on(run: Run, batch: Batch, *, logs: bool) -> None:
    """Take the next step, on `batch`; logs: measure it, and write a line. Raises Diverged, on all ranks."""
    if is_custom(run.settings.model.arch):  # it may draw, as dropout does: by step, so that a resume is exact
        set_seed(int(keyed(_DRAWS, run.settings.seed, run.done, rank())) >> 32)  # torch, numpy, random
    result = run.model.step(batch, measured=logs)
    run.done += 1
    substituted = batch.substituted if run.settings.data.on_bad == "skip" else None
    run.monitor.add(result, run.settings.data.batch, batch.waited, substituted)
    if run.probe is not None and run.done % run.settings.probe.every == 0:
        assert result.features is not None
        run.probe.update(result.features, batch.ids, result.taken)
    if logs:
        rates = run.model.step.schedule.numbers()
        if run.model.target is None:
            del rates["momentum"]
        rates |= run.probe.take_accuracy() if run.probe is not None else {}
        run.monitor.log(run.done, run.done / run.loader.steps, result.measures, **rates)
        raise_if_diverged(run)


def _end_epoch(run: Run, epoch: int, *, saved: bool = False) -> Stopped | None:
    """Evaluate and save after `epoch` epochs, each where the settings ask for it; return a stop request.

    A long evaluation may be interrupted, and starts again when resumed: the encoder is saved before it, unless `saved`.
    """
    every = run.settings.save_every
    if is_evaluation_due(run, epoch) and not saved:
        save(run)
    try:
        with run.watchdog.paused():
            evaluate(run, epoch)
    except Stopped as stopped:
        return stopped
    if not every or run.done % every == 0 or run.done == run.total:
        save(run)
    return None


def is_evaluation_due(run: Run, epoch: int) -> bool:
    """Return whether the settings ask for an evaluation after `epoch` epochs."""
    every, last = run.settings.knn.every, epoch == run.settings.optim.epochs
    return run.data.knn is not None and bool(every) and (epoch % every == 0 or last)


def evaluate(run: Run, epoch: int) -> None:
    """Evaluate after `epoch` epochs where the settings ask for it. Raises Stopped after a stop request."""

    def raise_stop() -> None:
        if stopped := run.requests.poll_stop(run.done, "batch of kNN"):
            raise stopped

    if run.data.knn is not None and is_evaluation_due(run, epoch):
        with run.monitor.pause(), RunningStatistics(run.backbone).averaged(), untuned_convolutions():
            classify = {"probe_top1": run.probe.classify} if run.probe is not None else {}
            scores = run.data.knn.scores(run.backbone, run.accelerator.autocast, raise_stop, **classify)
            run.monitor.evaluation(run.done, epoch, **scores)
            run.evaluated_on = run.data.knn_fingerprint or ""
    run.evaluated = epoch


def _log_finished(run: Run) -> dict[str, Any]:
    """Return the summary of a run with nothing left to train, on rank 0; write it where it is missing."""
    requested = f"{counted(run.settings.optim.epochs, 'epoch')}, {counted(run.total, 'step')}"
    logger.info(f"nothing to train: {counted(run.done, 'step')} done; {requested} requested")
    if rank() == 0 and not (run.folder.path / "summary.json").exists():  # killed after its last checkpoint
        _summarize(run)
    _print_result(run)
    if rank() == 0:
        return dict(read_json(run.folder.path / "summary.json", _SUMMARY_BYTES, "remove it, then resume again"))
    return {**run.monitor.last, "step": run.done}


def _summarize(run: Run) -> dict[str, Any]:
    """Return the summary of a finished run; rank 0 writes it."""
    monitor = run.monitor
    summary = {
        **monitor.last,
        **({"skipped": monitor.skipped} if monitor.skipped else {}),
        "pairs_per_second": round(monitor.pairs / monitor.seconds, 1) if monitor.seconds else None,
        "data_wait_fraction": round(monitor.waited / monitor.seconds, 4) if monitor.seconds else None,
        "training_seconds": round(monitor.seconds, 1),
        "world_size": world(),
        "precision": run.accelerator.mixed_precision,
        "device": torch.cuda.get_device_name() if run.accelerator.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if rank() == 0:
        write_json(run.folder.path / "summary.json", summary)
    return summary


def _print_result(run: Run) -> None:
    """Print loss and kNN top-1 of a finished run, on rank 0."""
    if rank() == 0:
        last, knn = run.monitor.last, run.settings.knn
        top1 = f", kNN top-1 {last['knn_top1']:.2%} (k {knn.k}, T {knn.temperature:g})" if "knn_top1" in last else ""
        loss = last.get("loss", math.nan)
        print(f"finished after step {run.done}: loss {loss:.4f}{top1}, run folder {run.folder.path}")
