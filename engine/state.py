"""All of a run that cannot be computed: what a checkpoint holds, saved and restored exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from engine import checkpoint
from engine.build import Run
from pipeline.errors import InputError


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
            tensors = {"model": modules(run).state_dict(), "optimiser": _optimiser_tensors(run)}
            checkpoint.save(run.out / "checkpoints", run.done, tensors, state, run.settings.keep)
    run.accelerator.wait_for_everyone()


def restore(run: Run) -> None:
    """Take up the checkpoint that `resume` names, exactly. With `auto` and none there, begin anew."""
    path = _to_resume(run)
    if path is None:
        return
    tensors, state = checkpoint.load(path)
    modules(run).load_state_dict(tensors["model"])
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


def modules(run: Run) -> nn.ModuleDict:
    """Return online encoder, momentum encoder and queue under the names they have in a checkpoint."""
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
