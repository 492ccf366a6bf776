"""All of a run that cannot be computed: what a checkpoint holds, saved and restored exactly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import compatibility, storage
from engine.checkpoint.provenance import commit, origin
from engine.optim.schedule import DOUBTFUL, PATIENCE
from engine.parallel import collectives
from engine.parallel.batchnorm_stats import RunningStatistics
from engine.parallel.consensus import from_first
from engine.training.build import Run
from engine.training.run_folder import claim
from pipeline.system.errors import InputError

_ROWS = "running_statistics"  # of each process, [world, N], where they differ: the model has their mean


def save(run: Run) -> None:
    """Begin to write a checkpoint of the run as it stands. Called by all processes.

    Not where steps are just being skipped, nor where training has diverged: such a state must not take an earlier's
    place. In that case raises FloatingPointError, on all alike; at the end of training it is divergence in any case.
    """
    refuse_divergence(run, DOUBTFUL if run.done == run.total else PATIENCE)
    if run.model.step.schedule.diverged(DOUBTFUL):
        if run.accelerator.is_main_process:
            print(f"warning: step {run.done}: not saved: steps are being skipped", file=sys.stderr)
        return
    _refuse_non_finite(run)
    state = {
        "evaluated": run.evaluated,
        "evaluated_on": run.evaluated_on,
        "loader": run.loader.state_dict(),
        "monitor": run.monitor.state_dict(),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        "settings": run.settings.as_dict(),
        "backend": run.backend.name,
        "origin": origin(run.loader.beton),
    }
    with _statistics(run).averaged() as rows:
        if run.accelerator.is_main_process:
            tensors = {"model": modules(run).state_dict(), "optimizer": _optimizer_tensors(run)}
            if rows is not None:
                tensors["ranks"] = {_ROWS: rows}
            run.writer.save(run.done, tensors, state)


class Diverged(FloatingPointError):
    """A training of which nothing good can come any more. All processes meet it, and the first says so."""

    reported = True


def refuse_divergence(run: Run, patience: int = PATIENCE) -> None:
    """Raise Diverged, on all processes alike, where the last `patience` steps or more were skipped."""
    if skipped := run.model.step.schedule.diverged(patience):
        raise Diverged(f"step {run.done}: loss or gradients have not been finite for {skipped} steps: {_remedy(run)}")


def _refuse_non_finite(run: Run) -> None:
    """Raise Diverged, on all processes alike, where a parameter is not finite."""
    norms = torch._foreach_norm([p.detach() for p in run.model.online.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise Diverged(f"after step {run.done}: parameters are not finite: {_remedy(run)}")


def _remedy(run: Run) -> str:
    """Return what to do about a run that diverged, with the last good checkpoint's name, which the first knows."""
    if not run.accelerator.is_main_process:
        return "see the first process"
    run.writer.wait()
    last, _ = storage.newest(run.out / "checkpoints")
    if last is None:
        return (
            "there is no checkpoint of it: begin anew with a lower optim.lr, a longer warm-up or optim.clip_grad_norm 1"
        )
    return f"go on from {last}, the last good one, at a lower rate: --resume auto --allow-change optim.lr --optim.lr N"


def restore(run: Run) -> None:
    """Take up the checkpoint that `resume` names, exactly. With `auto` and none there, begin anew.

    The first process reads it, and tells the others. Raises InputError, on all of them, where it does not fit the
    settings, or where the run folder already holds later ones.
    """
    commit()  # before the tree can change: checkpoints name the one that was imported
    read: dict[str, Any] = {}
    found = from_first(lambda: _read(run, read))
    if found is None:
        return
    tensors, state = read.get("tensors", {}), found["state"]
    device = run.accelerator.device
    of = {name: collectives.broadcast(tensors.get(name, {}), like, device) for name, like in found["tensors"].items()}
    modules(run).load_state_dict(of["model"])
    run.model.step.schedule.skipped.zero_()
    for name, value in _optimizer_tensors(run).items():
        value.copy_(of["optimizer"][name])
    rows = of.get("ranks", {}).get(_ROWS)
    if rows is not None and len(rows) == collectives.world():  # on another number of processes their mean, in the model
        _statistics(run).put(rows[collectives.rank()])
    try:
        run.loader.load_state_dict(state["loader"])
        run.monitor.load_state_dict(state["monitor"])
        if run.accelerator.scaler and state.get("scaler"):
            run.accelerator.scaler.load_state_dict(state["scaler"])
        run.evaluated_on = str(state.get("evaluated_on", ""))  # older checkpoints do not say
        run.evaluated, backend = int(state["evaluated"]), str(state["backend"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"{found['path']}/state.json: not of such a run ({problem}): resume from another") from None
    run.done = state["step"]
    if run.accelerator.is_main_process:
        print(f"resumed from {found['path']}", file=sys.stderr)
        if backend != run.backend.name:
            print(
                f"warning: data.backend {run.backend.name} decodes and resizes a little differently from the "
                f"checkpoint's {backend}: resume with --data.backend {backend} for the same images",
                file=sys.stderr,
            )


def _read(run: Run, into: dict[str, Any]) -> dict[str, Any] | None:
    """Return path and state of the checkpoint to resume, and dtype and shape of its tensors, which go `into`."""
    path = _to_resume(run)
    if path is None:
        return None
    tensors, state = storage.load(path)
    compatibility.compare(run.settings, state["settings"])
    compatibility.compare_images(run.settings, run.knn.fingerprint if run.knn else None, state.get("evaluated_on", ""))
    later, _ = storage.newest(run.out / "checkpoints")
    if later is not None and storage.step_of(later) > state["step"]:
        raise InputError(
            f"{run.out}: holds {later.name}, later than {path}: choose another --out, or remove the later checkpoints"
        )
    _check_fit(path, {"model": modules(run).state_dict(), "optimizer": _optimizer_tensors(run)}, tensors)
    into["tensors"] = tensors
    if "ranks" in tensors:
        saved = tensors["ranks"].get(_ROWS, torch.zeros(1, 0))
        rows = len(saved) if saved.dim() else 0
        _check_fit(path, {"ranks": {_ROWS: _statistics(run).own().expand(rows, -1)}}, tensors)
    like = {file: collectives.described(named) for file, named in tensors.items()}
    return {"path": str(path), "state": state, "tensors": like}


def _check_fit(path: Path, own: dict[str, storage.Tensors], saved: dict[str, storage.Tensors]) -> None:
    """Refuse tensors of other names, shapes or dtypes than the run's own."""
    for file, expected in own.items():
        found = saved.get(file, {})
        for name in sorted(expected.keys() | found.keys()):
            a, b = expected.get(name), found.get(name)
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                told = ["is missing" if t is None else f"is {t.dtype} {list(t.shape)}" for t in (a, b)]
                raise InputError(
                    f"{path / file}.safetensors: {name} {told[1]} there, and {told[0]} in this run: resume from another"
                )


def _to_resume(run: Run) -> Path | None:
    folder = run.out / "checkpoints"
    if folder.is_dir():
        try:
            claim(run)
        except OSError as error:
            raise InputError(
                f"{run.out}: {error.strerror or error}: make it writable, or choose another --out"
            ) from None
    if run.settings.resume == "auto":
        path, broken = storage.newest(folder)
        if run.accelerator.is_main_process:
            for problem in broken:
                print(f"warning: passed over: {problem}", file=sys.stderr)
        return path
    if run.settings.resume:
        return Path(run.settings.resume)
    if any(folder.glob("step_*")):
        raise InputError(f"{run.out}: already holds a run: add --resume auto to go on with it, or choose another --out")
    return None


def _statistics(run: Run) -> RunningStatistics:
    return RunningStatistics(run.accelerator.unwrap_model(run.model.online), run.model.target)


def modules(run: Run) -> nn.ModuleDict:
    """Return the modules of a checkpoint by name: online encoder, schedule and, if any, momentum encoder and queue."""
    found = {
        "online": run.accelerator.unwrap_model(run.model.online),
        "target": run.model.target,
        "queue": run.model.queue,
        "schedule": run.model.step.schedule,
    }
    return nn.ModuleDict({name: module for name, module in found.items() if module is not None})


def _named_states(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """Return the optimizer's state of each parameter, by the parameter's name."""
    names = {id(p): name for name, p in run.accelerator.unwrap_model(run.model.online).named_parameters()}
    return {names[id(p)]: state for p, state in run.model.optimizer.state.items()}


def _optimizer_tensors(run: Run) -> dict[str, torch.Tensor]:
    states = _named_states(run)
    return {
        f"{name}|{key}": value for name, state in states.items() for key, value in state.items() if value is not None
    }
