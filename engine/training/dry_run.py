"""What a run would be: built, a step taken on stub batches, its parameters, cost, memory and steps printed."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from engine.config.settings import Settings
from engine.optim.schedule import peak_rate
from engine.parallel.accelerator import bfloat16_on_cpu, build_accelerator
from engine.parallel.rendezvous import rank
from engine.training.build import check_batch
from engine.training.model import Model, build_model, needed_views
from pipeline.loader import Batch
from pipeline.sampling.order import steps_per_epoch
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError

_STUB = 2  # samples a part of the smaller stub batch
_GIB = 2**30
_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.convolution, _ATEN.convolution_backward, _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}
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
    parameters, gradients, optimizer, momentum encoder, queue, views, and the activations kept for the backward pass,
    which are extrapolated from the two stub batches; `memory_of` says it for any number. Where a CPU would emulate
    bfloat16, matrix products are not computed. norm_passes: BatchNorm layers
    passed a step, without and with a gradient. Raises InputError for settings that cannot work.
    """
    length = _length(settings)
    accelerator = build_accelerator(replace(settings, tracker="none"), emulate=True)
    check_batch(settings, accelerator)
    model = build_model(
        replace(settings, gradient_accumulation_steps=1, micro_batch=0, compile=False), accelerator
    )  # one part
    small, _, passes = _step(settings, model, _STUB)
    large, flops, _ = _step(settings, model, 2 * _STUB)
    slope = (large - small) / _STUB
    found: dict[str, Any] = {
        **_parameters(model),
        "flops_a_pair": flops / (2 * _STUB),
        "activation_bytes_a_pair": slope,
        "view_bytes_a_pair": 4 * 3 * settings.data.size**2 * len(needed_views(settings)),
        "held_bytes": _held(settings, model) + max(0.0, small - _STUB * slope),
        "norm_passes": passes,
        **length,
    }
    batch = settings.data.batch
    parts = {n: settings.parts(n) for n in _PROCESSES if batch % n == 0}
    fitting = [n for n in parts if batch % (n * parts[n]) == 0 and batch // (n * parts[n]) >= 2]
    found["memory"] = {n: memory_of(found, batch // n, parts[n]) for n in fitting}
    accelerator.free_memory()
    return found


def memory_of(found: dict[str, Any], pairs: float, parts: int = 1) -> float:
    """Return the bytes that a process needs whose share of the batch is so many pairs, computed in so many parts."""
    kept = found["activation_bytes_a_pair"] / parts + found["view_bytes_a_pair"]
    return found["held_bytes"] + pairs * kept


class _Hollow(TorchDispatchMode):
    """Convolutions and matrix products give zeros of the right shape: what is kept is the same, in no time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in _PRODUCTS:
            return func(*args, **kwargs or {})
        shaped, others = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs or {}))
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))

        def zeros(made: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=device).zero_()

        return tree_map_only(torch.Tensor, zeros, func(*shaped, **others))


def _step(settings: Settings, model: Model, count: int) -> tuple[int, int, tuple[int, int]]:
    """Train on `count` samples; return the bytes they keep for the backward pass, FLOPs, and BatchNorm's passes."""
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
    passes = [0, 0]

    def count_pass(*_: Any) -> None:
        passes[torch.is_grad_enabled()] += 1

    encoders = [encoder for encoder in (model.step.encoder, model.target) if encoder is not None]
    norms = [module for encoder in encoders for module in encoder.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_hook(count_pass) for norm in norms]
    counter = FlopCounterMode(display=False)
    emulated = settings.precision == "bf16" and device.type == "cpu" and not bfloat16_on_cpu()
    hollow = _Hollow() if emulated else contextlib.nullcontext()
    with hollow, counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.step(Batch(views, np.arange(count), 0, 0, 0.0))
    for hook in hooks:
        hook.remove()
    return sum(kept.values()), counter.get_total_flops(), (passes[0], passes[1])


def _parameters(model: Model) -> dict[str, int]:
    online = model.step.encoder
    parts = {"backbone": online.backbone, "projector": online.projector, "predictor": online.predictor}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    trained = sum(p.numel() for p in online.parameters() if p.requires_grad)
    return {**counts, "trained": trained}


def _held(settings: Settings, model: Model) -> int:
    """Return the bytes of weights, gradients, optimizer, momentum encoder and queue."""
    online = model.step.encoder
    states = {"sgd": 1, "lars": 1, "adamw": 2}[settings.optim.name]
    modules = [module for module in (online, model.target, model.queue) if module is not None]
    held = sum(t.nbytes for module in modules for t in module.state_dict().values())
    return held + (1 + states) * sum(p.nbytes for p in online.parameters() if p.requires_grad)


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
    table = Table(title=f"{settings.objective}, {settings.model.arch}", show_header=False)
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
