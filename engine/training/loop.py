"""The training loop, from top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import platform
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch

from engine.config.settings import Settings
from engine.fault_tolerance.heartbeat import Heartbeat, LostProcess
from engine.fault_tolerance.preemption import Stopped, follow_launcher
from engine.fault_tolerance.watchdog import dump_stacks
from engine.parallel.accelerator import now
from engine.parallel.batchnorm_stats import RunningStatistics
from engine.parallel.consensus import Told, together
from engine.parallel.rendezvous import rank
from engine.training.build import Run, build
from engine.training.resume import refuse_divergence, restore, save
from engine.training.run_folder import begin, check_out
from pipeline.loader import Batch
from pipeline.system.errors import LoaderStalled, RunFailed, reason
from pipeline.system.files import write_json

_ALIKE = (Stopped, Told, FloatingPointError)  # what all processes meet, each at its own time


def train(settings: Settings) -> dict[str, Any]:
    """Train as `settings` say; return what `OUT/summary.json` says. Raises Stopped where it was asked to stop.

    Where no batch came in time, or a process was lost, prints every thread's stack before it raises what happened.
    """
    follow_launcher()
    run: Run | None = None
    heartbeat = Heartbeat(settings.collective_timeout)
    with contextlib.ExitStack() as held:
        try:
            together(lambda: check_out(settings))
            run = build(settings)
            held.enter_context(run.requests.heeded())  # until the failure of another process is explained, too
            return _trained(run, heartbeat)
        except BaseException as error:
            meant = heartbeat.explained(error, settings.collective_timeout, isinstance(error, _ALIKE))
            if isinstance(meant, (LoaderStalled, LostProcess)):
                dump_stacks(error)
            if isinstance(meant, LoaderStalled):
                where = f"process {rank()} on {platform.node()}, step {heartbeat.step}"
                meant = LoaderStalled(f"{where}: {error}; the stack of every thread is above")
            if isinstance(meant, torch.OutOfMemoryError):
                meant = RunFailed(f"step {heartbeat.step}, {_memory(error)}")
            if meant is error:
                raise
            raise meant from error
        finally:
            heartbeat.unwatch()
            if run is not None:
                run.close()
            heartbeat.close()


def _memory(error: BaseException) -> str:
    said = reason(error).partition(". ")[0]
    remedy = "compute less at once (--micro_batch, or --activation-checkpointing); --dry-run estimates what a run takes"
    return f"memory of the GPU is full ({said}): {remedy}"


def _trained(run: Run, heartbeat: Heartbeat) -> dict[str, Any]:
    restore(run)
    if run.done >= run.total and not _unevaluated(run):
        return _already_finished(run)
    together(lambda: begin(run))
    together(lambda: run.monitor.start(run.done, run.evaluated))
    stopped = _epochs(run, heartbeat)
    together(run.writer.finish)
    summary = {} if stopped else _summarize(run)
    run.accelerator.end_training()  # not after a failure: it waits for processes that may never come
    if stopped:
        raise stopped
    return summary


def _already_finished(run: Run) -> dict[str, Any]:
    if run.accelerator.is_main_process:
        asked = f"{run.settings.optim.epochs} epochs, {run.total} steps"
        print(f"nothing to train: {run.done} steps are done of the {asked} asked for", file=sys.stderr)
        if not (run.out / "summary.json").exists():  # it ended between its last checkpoint and that
            _summarize(run)
    return {**run.monitor.last, "step": run.done}


def _unevaluated(run: Run) -> bool:
    """Return whether what was resumed is of an epoch's end, before its evaluation was over."""
    epochs, more = divmod(run.done, run.loader.steps)
    return run.evaluated < epochs and not more


def _epochs(run: Run, heartbeat: Heartbeat) -> Stopped | None:
    """Train until the end, or until all processes were asked to stop, whereof all are saved."""
    settings, steps = run.settings, run.loader.steps
    heartbeat.step = run.done
    if _unevaluated(run) and (stopped := _end_epoch(run, run.done // steps, saved=settings.resume == "auto")):
        return stopped
    for epoch in range(run.done // steps, settings.optim.epochs):
        for batch in run.loader:
            ends = (run.done + 1) % steps == 0
            train_on(run, batch, logs=ends or (run.done + 1) % settings.log_every == 0)
            heartbeat.step = run.done
            run.watchdog.beat(run.done)
            stopped = run.requests.agreed(run.done) if run.done < run.total else None
            if stopped or (settings.save_every and run.done % settings.save_every == 0 and not ends):
                save(run)
            if stopped:
                return stopped
        if stopped := _end_epoch(run, epoch + 1):
            return stopped
    return None


def _end_epoch(run: Run, epoch: int, *, saved: bool = False) -> Stopped | None:
    """Evaluate and save after `epoch` epochs, each where the settings ask for it. Returns as `_epochs` does.

    An evaluation may take long, and be cut short: what it is of is saved before it, unless that is `saved`; when
    resumed, it begins anew.
    """
    every = run.settings.save_every
    if evaluates(run, epoch) and not saved:
        save(run)
    try:
        with run.watchdog.paused():
            evaluate(run, epoch)
    except Stopped as stopped:
        return stopped
    if not every or run.done % every == 0 or run.done == run.total:
        save(run)
    return None


def train_on(run: Run, batch: Batch, *, logs: bool) -> None:
    """Take the next step, on `batch`; logs: measure it, and write a line. Raises FloatingPointError: diverged."""
    result = run.model.step(batch, measured=logs)
    run.done += 1
    substituted = batch.substituted if run.settings.data.on_bad == "skip" else None
    run.monitor.add(result, run.settings.data.batch, batch.waited, substituted)
    if logs:
        rates = run.model.step.schedule.numbers()
        if run.model.target is None:
            del rates["momentum"]
        run.monitor.log(run.done, run.done / run.loader.steps, result.measures, **rates)
        refuse_divergence(run)


def evaluates(run: Run, epoch: int) -> bool:
    """Return whether the settings ask for an evaluation after `epoch` epochs."""
    every, last = run.settings.knn.every, epoch == run.settings.optim.epochs
    return run.knn is not None and bool(every) and (epoch % every == 0 or last)


def evaluate(run: Run, epoch: int) -> None:
    """Evaluate after `epoch` epochs, where the settings ask for it. Raises Stopped where it was asked to stop."""

    def heed() -> None:
        if stopped := run.requests.agreed(run.done, "batch of kNN"):
            raise stopped

    if run.knn is not None and evaluates(run, epoch):
        with run.monitor.pause(), RunningStatistics(run.backbone).averaged():
            top1 = run.knn.top1(run.backbone, run.accelerator.autocast, heed)
            run.monitor.evaluation(run.done, epoch, knn_top1=top1)
            run.evaluated_on = run.knn.fingerprint
    run.evaluated = epoch


def measure_rate(settings: Settings, steps: int = 20) -> float:
    """Return pairs a second of such a run on this machine, over a few steps after as many to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(replace(settings, out=folder, tracker="none"))
        try:
            for number, batch in enumerate(itertools.islice(run.loader.endless(), 2 * steps)):
                if number == steps:
                    start = now(run.accelerator.device)
                run.model.step(batch)
            return steps * settings.data.batch / (now(run.accelerator.device) - start)
        finally:
            run.close()
            run.accelerator.free_memory()


def _summarize(run: Run) -> dict[str, Any]:
    monitor = run.monitor
    summary = {
        **monitor.last,
        **({"skipped": monitor.skipped} if monitor.skipped else {}),
        "pairs_per_second": round(monitor.pairs / monitor.seconds, 1) if monitor.seconds else None,
        "data_wait_fraction": round(monitor.waited / monitor.seconds, 4) if monitor.seconds else None,
        "training_seconds": round(monitor.seconds, 1),
        "processes": run.accelerator.num_processes,
        "precision": run.accelerator.mixed_precision,
        "device": torch.cuda.get_device_name() if run.accelerator.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if run.accelerator.is_main_process:
        write_json(run.out / "summary.json", summary)
    return summary
