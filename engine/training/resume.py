"""The state of a run that cannot be computed: saved in a checkpoint, restored exactly."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn

from engine.checkpoint import compatibility, storage
from engine.checkpoint.provenance import commit, origin
from engine.optim.schedule import DOUBTFUL, PATIENCE
from engine.parallel import collectives
from engine.parallel.batchnorm_stats import RunningStatistics
from engine.parallel.consensus import broadcast_object
from engine.parallel.rendezvous import rank, world
from engine.training.build import Run
from engine.weights.initialize import initialize
from pipeline.system.errors import InputError

logger = get_logger(__name__)

_PROBE = "probe"  # file of the probe, which a run may leave out or begin when it is resumed
_ROWS = "running_statistics"  # [world, N], saved where ranks differ: the model has their mean


class Diverged(FloatingPointError):
    """Training diverged; raised on every rank and reported by rank 0."""

    reported = True


def save(run: Run) -> None:
    """Start to write a checkpoint of the run. Called by all ranks.

    Writes none while steps are being skipped. Raises Diverged, on every rank, where the training has diverged; at the
    end of training a few skipped steps are divergence already: no such state may replace an earlier checkpoint.
    """
    raise_if_diverged(run, DOUBTFUL if run.done == run.total else PATIENCE)
    if run.model.step.schedule.diverged(DOUBTFUL):
        logger.warning(f"step {run.done}: not saved: steps are being skipped")
        return
    _refuse_non_finite(run)
    scaler = run.accelerator.scaler
    state = {
        "evaluated": run.evaluated,
        "evaluated_on": run.evaluated_on,
        "loader": run.loader.state_dict(),
        "monitor": run.monitor.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
        "settings": run.settings.as_dict(),
        "backend": run.data.backend.name,
        "origin": origin(run.data.train),
        "started_from": run.started_from,
    }
    with _statistics(run).averaged() as rows:
        if rank() == 0:
            tensors = {"model": modules(run).state_dict(), "optimizer": _optimizer_tensors(run)}
            if rows is not None:
                tensors["ranks"] = {_ROWS: rows}
            if run.probe is not None:
                tensors[_PROBE] = run.probe.state_dict()
            run.writer.save(run.done, tensors, state)


def raise_if_diverged(run: Run, patience: int = PATIENCE) -> None:
    """Raise Diverged, on every rank, where the last `patience` steps or more were skipped. Waits for the device."""
    if skipped := run.model.step.schedule.diverged(patience):
        raise Diverged(f"step {run.done}: loss or gradients have not been finite for {skipped} steps: {_remedy(run)}")


def _refuse_non_finite(run: Run) -> None:
    """Raise Diverged, on every rank, where a parameter is not finite."""
    norms = torch._foreach_norm([p.detach() for p in run.model.online.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise Diverged(f"after step {run.done}: parameters are not finite: {_remedy(run)}")


def _remedy(run: Run) -> str:
    """Return the remedy for a diverged run, with the name of the last good checkpoint, which rank 0 knows."""
    if rank():
        return "see rank 0"
    run.writer.wait()
    last, _ = storage.newest(run.folder.checkpoints)
    if last is None:
        remedy = "start again with a lower optim.lr, a longer warm-up or optim.clip_grad_norm 1"
        return f"there is no checkpoint of it: {remedy}"
    return f"resume from {last}, the last good one, at a lower rate: --resume auto --allow-change optim.lr --optim.lr N"


def restore(run: Run) -> None:
    """Resume exactly from the checkpoint that `resume` names, or start a new run; open run folder and metrics.

    With `auto` and no checkpoint the run is new, with the weights that `model.init` names, if any. The last of four
    agreements before training: rank 0 reads, checks and writes files, the others receive the state. Raises InputError,
    on all ranks, where the checkpoint does not fit the run, or the run folder cannot be written or has later
    checkpoints.
    """
    commit()  # before the tree can change: checkpoints name the commit that was imported
    tensors: dict[str, storage.Tensors] = {}
    checkpoint = broadcast_object(lambda: _open(run, tensors))
    if checkpoint is not None:
        device = run.accelerator.device
        files = checkpoint["tensors"].items()
        _load_tensors(run, {file: collectives.broadcast(tensors.get(file, {}), like, device) for file, like in files})
        if rank():
            _load_state(run, checkpoint)
        logger.info(f"resumed from {checkpoint['path']}")
        if (backend := checkpoint["state"]["backend"]) != run.data.backend.name:
            logger.warning(
                f"data.backend {run.data.backend.name} decodes and resizes a little differently from the "
                f"checkpoint's {backend}: resume with --data.backend {backend} for the same images"
            )
    elif run.settings.model.init:
        _share_weights(run)
    run.model.step.schedule.skipped.zero_()
    if run.finished:
        return
    logger.info(f"data.backend: {run.data.backend.name} ({run.data.backend.why})")
    if run.settings.compile:
        logger.info("compile: the first steps, and those of each new size, take a minute or more")


def _open(run: Run, tensors: dict[str, storage.Tensors]) -> dict[str, Any] | None:
    """Load the checkpoint to resume, if any, and open run folder and metrics; for rank 0.

    Returns path, state, and dtype and shape of the tensors, which are put into `tensors`.
    """
    if not run.settings.resume:
        _start(run)  # before the folder is made
    run.folder.claim()
    checkpoint = _read(run, tensors)
    if checkpoint is not None:
        _load_state(run, checkpoint)
    elif run.settings.resume:
        _start(run)
    if not run.finished:
        run.folder.write_config()
        run.monitor.start(run.done, run.evaluated)
    return checkpoint


def _read(run: Run, tensors: dict[str, storage.Tensors]) -> dict[str, Any] | None:
    if not run.settings.resume:
        return None
    newest, broken = storage.newest(run.folder.checkpoints)
    path = Path(run.settings.resume)
    if run.settings.resume == "auto":
        for problem in broken:
            logger.warning(f"skipped: {problem}")
        if newest is None:
            return None
        path = newest
    saved, state = storage.load(path)
    for warning in compatibility.compare(run.settings, state, run.data.train.fingerprint, run.data.knn_fingerprint):
        logger.warning(warning)
    if newest is not None and storage.step_of(newest) > state["step"]:
        problem = f"{run.folder.path}: contains {newest.name}, which is later than {path}"
        raise InputError(f"{problem}: choose another --out, or delete the later checkpoints")
    _check_fit(path, {"model": modules(run).state_dict(), "optimizer": _optimizer_tensors(run)}, saved)
    if "ranks" in saved:
        statistics = saved["ranks"].get(_ROWS, torch.zeros(1, 0))
        rows = len(statistics) if statistics.dim() else 0
        _check_fit(path, {"ranks": {_ROWS: _statistics(run).local().expand(rows, -1)}}, saved)
    if run.probe is not None and _PROBE in saved:
        _check_fit(path, {_PROBE: run.probe.state_dict()}, saved)
    tensors |= saved
    like = {file: collectives.described(named) for file, named in saved.items()}
    return {"path": str(path), "state": state, "tensors": like}


def _start(run: Run) -> None:
    """Start from the weights that `model.init` names, if any."""
    if run.settings.model.init:
        run.started_from, lines = initialize(run.model.step.encoder, run.settings)
        for line in lines:
            logger.info(line)


def _share_weights(run: Run) -> None:
    """Give rank 0's online encoder to all ranks, and to the momentum encoder."""
    encoder, target = run.model.step.encoder, run.model.target
    state = encoder.state_dict()
    encoder.load_state_dict(collectives.broadcast(state, collectives.described(state), run.accelerator.device))
    if target is not None:
        state = encoder.state_dict()
        target.load_state_dict({name: state[name] for name in target.state_dict()})


def _check_fit(path: Path, expected: dict[str, storage.Tensors], saved: dict[str, storage.Tensors]) -> None:
    """Raise InputError for saved tensors of other names, shapes or dtypes than expected."""
    for file, named in expected.items():
        ours, theirs = collectives.described(named), collectives.described(saved.get(file, {}))
        for name in sorted(ours.keys() | theirs.keys()):
            present, stored = ("{} {}".format(*kinds[name]) if name in kinds else "missing" for kinds in (ours, theirs))
            if present != stored:
                problem = f"{name} is {stored} in the checkpoint, and {present} in this run"
                raise InputError(f"{path / file}.safetensors: {problem}: resume from another")


def _load_state(run: Run, checkpoint: dict[str, Any]) -> None:
    """Load the plain values of a checkpoint. Raises InputError where they are not a run's."""
    state = checkpoint["state"]
    try:
        run.loader.load_state_dict(state["loader"])
        run.monitor.load_state_dict(state["monitor"])
        if run.accelerator.scaler and state.get("scaler"):
            run.accelerator.scaler.load_state_dict(state["scaler"])
        run.evaluated_on = str(state.get("evaluated_on", ""))  # older checkpoints lack it
        run.started_from = dict(state.get("started_from", {}))
        run.evaluated, state["backend"] = int(state["evaluated"]), str(state["backend"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
        path = f"{checkpoint['path']}/state.json"
        raise InputError(f"{path}: not of such a run ({problem}): resume from another") from None
    run.done = state["step"]


def _load_tensors(run: Run, tensors: dict[str, storage.Tensors]) -> None:
    modules(run).load_state_dict(tensors["model"])
    for name, value in _optimizer_tensors(run).items():
        value.copy_(tensors["optimizer"][name])
    if run.probe is not None and _PROBE in tensors:
        run.probe.load_state_dict(tensors[_PROBE])
    rows = tensors.get("ranks", {}).get(_ROWS)
    if rows is not None and len(rows) == world():  # else the mean, which the model has
        _statistics(run).put(rows[rank()])


def _statistics(run: Run) -> RunningStatistics:
    return RunningStatistics(run.model.step.encoder, run.model.target)


def modules(run: Run) -> nn.ModuleDict:
    """Return the modules of a checkpoint by name: online encoder, schedule and, if any, momentum encoder and queue."""
    model = run.model
    named = {
        "online": model.step.encoder,
        "target": model.target,
        "queue": model.queue,
        "schedule": model.step.schedule,
    }
    return nn.ModuleDict({name: module for name, module in named.items() if module is not None})


def _optimizer_tensors(run: Run) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors by the parameter's name and their own, `PARAMETER|STATE`."""
    names = {id(p): name for name, p in run.model.step.encoder.named_parameters()}
    states = {names[id(p)]: state for p, state in run.model.optimizer.state.items()}
    return {f"{name}|{key}": value for name, s in states.items() for key, value in s.items() if value is not None}
