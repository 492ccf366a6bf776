"""What a run would be: built, a step taken on stub batches, its parameters, cost, memory and steps printed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from engine.build import Model, build_accelerator, build_model, check_batch, needed_views
from engine.config import Settings
from engine.meeting import rank
from engine.schedule import peak_rate
from pipeline.direct import open_data
from pipeline.errors import InputError
from pipeline.loader import Batch
from pipeline.order import steps_per_epoch

_STUB = 2  # samples a part of the smaller stub batch
_GIB = 2**30
_PROCESSES = (1, 2, 4, 8, 16, 32)


def dry_run(settings: Settings) -> dict[str, Any]:
    """Print, on the first process, and return what `estimate` says of a run."""
    found = estimate(settings)
    if rank() == 0:
        _print(settings, found)
    return found


def estimate(settings: Settings) -> dict[str, Any]:
    """Build the model, train on two stub batches, and return what the run would be. Writes nothing.

    flops_a_pair: of all matrix products and convolutions of a step. memory: bytes by number of processes, an estimate:
    parameters, gradients, optimiser, momentum encoder, queue, views, and the activations kept for the backward pass,
    which are extrapolated from the two stub batches. Raises InputError for settings that cannot work.
    """
    length = _length(settings)
    accelerator = build_accelerator(replace(settings, tracker="none"))
    check_batch(settings, accelerator)
    model = build_model(replace(settings, accumulate=1, micro_batch=0, compile=False), accelerator)  # one part
    small, _ = _step(settings, model, _STUB)
    large, flops = _step(settings, model, 2 * _STUB)
    slope = (large - small) / _STUB
    found = {
        **_parameters(model),
        "flops_a_pair": flops / (2 * _STUB),
        "activation_bytes_a_pair": slope,
        "memory": _memory(settings, model, slope, max(0.0, small - _STUB * slope)),
        **length,
    }
    accelerator.free_memory()
    return found


def _step(settings: Settings, model: Model, count: int) -> tuple[int, int]:
    """Train on `count` samples; return the bytes they keep for the backward pass, and FLOPs."""
    device = next(model.online.parameters()).device
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.online.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    side = settings.data.size
    views = tuple(
        torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last) for _ in range(2)
    )
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.step(Batch(views, np.arange(count), 0, 0, 0.0))
    return sum(kept.values()), counter.get_total_flops()


def _parameters(model: Model) -> dict[str, int]:
    online = model.step.encoder
    parts = {"backbone": online.backbone, "projector": online.projector, "predictor": online.predictor}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    trained = sum(p.numel() for p in online.parameters() if p.requires_grad)
    return {**counts, "trained": trained}


def _memory(settings: Settings, model: Model, slope: float, constant: float) -> dict[int, float]:
    """Return the bytes a process needs, by the number of processes that divides the batch."""
    online = model.step.encoder
    states = {"sgd": 1, "lars": 1, "adamw": 2}[settings.optim.name]
    modules = [module for module in (online, model.target, model.queue) if module is not None]
    held = sum(t.nbytes for module in modules for t in module.state_dict().values())
    held += (1 + states) * sum(p.nbytes for p in online.parameters() if p.requires_grad)
    views = 4 * 3 * settings.data.size**2 * len(needed_views(settings))
    batch = settings.data.batch
    parts = {n: settings.parts(n) for n in _PROCESSES if batch % n == 0}
    fitting = [n for n in parts if batch % (n * parts[n]) == 0 and batch // (n * parts[n]) >= 2]
    return {n: held + constant + batch / n * views + batch / (n * parts[n]) * slope for n in fitting}


def _length(settings: Settings) -> dict[str, int]:
    """Return images and steps; none where neither the data nor data.samples is given."""
    tolerant = settings.data.on_bad == "skip"
    samples = len(open_data(settings.data.train, tolerate=tolerant)) if settings.data.train else settings.data.samples
    if not samples:
        return {}
    epoch = steps_per_epoch(samples, settings.data.batch)
    if not epoch:
        raise InputError(f"data.batch {settings.data.batch}: more than the {samples} images: choose at most {samples}")
    return {"samples": samples, "steps_an_epoch": epoch, "steps": epoch * settings.optim.epochs}


def _print(settings: Settings, found: dict[str, Any]) -> None:
    method = " + ".join([settings.method.name, *(n for n, t in settings.as_dict()["terms"].items() if t)])
    table = Table(title=f"{method}, {settings.model.arch}", show_header=False)
    for name in ("backbone", "projector", "predictor", "trained"):
        if name in found:
            table.add_row(f"parameters, {name}", f"{found[name]:,}")
    table.add_row("FLOPs a pair", f"{found['flops_a_pair'] / 1e9:.2f} G")
    table.add_row("activations a pair", f"{found['activation_bytes_a_pair'] / 2**20:.1f} MiB")
    memory = ", ".join(f"{n}: {size / _GIB:.1f}" for n, size in found["memory"].items())
    table.add_row(
        "memory, GiB, by number of processes (estimate)", memory or "no number of processes divides the batch"
    )
    table.add_row("learning rate at its highest", f"{peak_rate(settings.optim, settings.data.batch):g}")
    if "steps" in found:
        steps = f"{found['steps']:,} ({settings.optim.epochs} epochs of {found['steps_an_epoch']:,})"
        table.add_row("steps", f"{steps}, {found['samples']:,} images in batches of {settings.data.batch}")
    else:
        table.add_row("steps", "unknown: give --data.train F.beton, or --data.samples N")
    Console().print(table)
