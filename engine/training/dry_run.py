"""A dry run: build the model, take a step on stub batches, and print parameters, cost, memory and steps."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from rich.console import Console
from rich.table import Table
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from engine.config.settings import Settings
from engine.optim.schedule import peak_rate
from engine.parallel.accelerator import build_accelerator
from engine.parallel.rendezvous import rank
from engine.training.build import check_batch, list_warnings
from engine.training.datasets import with_statistics
from engine.training.model import Model, build_model, needed_views
from engine.weights.initialize import initialize
from pipeline.loader import Batch
from pipeline.sampling.order import steps_per_epoch
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError
from pipeline.system.text import binary, counted

logger = get_logger(__name__)

_STUB_SAMPLES = 2  # samples of the smaller of the two stub batches
_ATEN = torch.ops.aten
_MATMULS = {_ATEN.convolution, _ATEN.convolution_backward, _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}
_WORLD_SIZES = (1, 2, 4, 8, 16, 32)


def dry_run(settings: Settings) -> dict[str, Any]:
    """Return `estimate` of a run; rank 0 prints it."""
    estimates = estimate(settings)
    if settings.data.train:
        settings = with_statistics(settings, open_data(settings.data.train, tolerate=True))
    if rank() == 0:
        _print(settings, estimates)
    return estimates


def estimate(settings: Settings) -> dict[str, Any]:
    """Build the model, train on two stub batches, and return counts and estimates of the run. Writes nothing.

    flops_a_pair: of all matrix products and convolutions of a step. memory: estimated bytes by world size, for
    parameters, gradients, optimizer, momentum encoder, queue, views, and the activations saved for the backward pass,
    which are extrapolated from the two stub batches; `memory_of` gives it for any share of a batch. Matrix products are
    counted, not computed. norm_passes: BatchNorm layers passed in a step, without and with
    gradient. Raises InputError for settings that cannot work.
    """
    length = _count_steps(settings)
    accelerator = build_accelerator(settings, emulate=True)
    check_batch(settings)
    for warning in list_warnings(settings, accelerator.device):
        logger.warning(warning)
    undivided = replace(settings, gradient_accumulation_steps=1, micro_batch=0, compile=False)
    model = build_model(undivided, accelerator)
    if settings.model.init and rank() == 0:
        _, lines = initialize(model.step.encoder, settings)
        for line in lines:
            logger.info(line)
    small, _, passes = _step(settings, model, _STUB_SAMPLES)
    large, flops, _ = _step(settings, model, 2 * _STUB_SAMPLES)
    slope = (large - small) / _STUB_SAMPLES
    estimates: dict[str, Any] = {
        **_count_parameters(model),
        "flops_a_pair": flops / (2 * _STUB_SAMPLES),
        "activation_bytes_a_pair": slope,
        "view_bytes_a_pair": 4 * 3 * settings.data.size**2 * len(needed_views(settings)),
        "held_bytes": _count_held_bytes(settings, model) + max(0.0, small - _STUB_SAMPLES * slope),
        "norm_passes": passes,
        **length,
    }
    batch = settings.data.batch
    parts = {n: settings.micro_batches(n) for n in _WORLD_SIZES if batch % n == 0}
    fitting = [n for n in parts if batch % (n * parts[n]) == 0 and batch // (n * parts[n]) >= 2]
    estimates["memory"] = {n: memory_of(estimates, batch // n, parts[n]) for n in fitting}
    accelerator.free_memory()
    return estimates


def memory_of(estimates: dict[str, Any], pairs: float, parts: int = 1) -> float:
    """Return the bytes that a rank needs for `pairs` samples of a batch, computed in `parts` parts."""
    bytes_per_pair = estimates["activation_bytes_a_pair"] / parts + estimates["view_bytes_a_pair"]
    return estimates["held_bytes"] + pairs * bytes_per_pair


class ZeroMatmuls(TorchDispatchMode):
    """Convolutions and matrix products return zeros of the right shape, at no cost: memory and counts stay the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in _MATMULS:
            return func(*args, **kwargs or {})
        meta_args, meta_kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs or {}))
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))

        def zeros(meta: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device).zero_()

        return tree_map_only(torch.Tensor, zeros, func(*meta_args, **meta_kwargs))


def _step(settings: Settings, model: Model, count: int) -> tuple[int, int, tuple[int, int]]:
    """Train on `count` samples; return the bytes saved for the backward pass, FLOPs, and BatchNorm's passes."""
    device = next(model.online.parameters()).device
    saved_bytes: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.online.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
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
    with ZeroMatmuls(), counter, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.step(Batch(views, np.arange(count), 0, 0, 0.0))
    for hook in hooks:
        hook.remove()
    return sum(saved_bytes.values()), counter.get_total_flops(), (passes[0], passes[1])


def _count_parameters(model: Model) -> dict[str, int]:
    online = model.step.encoder
    parts = {"backbone": online.backbone, "projector": online.projector, "predictor": online.predictor}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    return {**counts, "trained": sum(p.numel() for p in online.parameters() if p.requires_grad)}


def _count_held_bytes(settings: Settings, model: Model) -> int:
    """Return the bytes of weights, gradients, optimizer, momentum encoder and queue."""
    online = model.step.encoder
    states = {"sgd": 1, "lars": 1, "adamw": 2}[settings.optim.name]
    modules = [module for module in (online, model.target, model.queue) if module is not None]
    held = sum(t.nbytes for module in modules for t in module.state_dict().values())
    return held + (1 + states) * sum(p.nbytes for p in online.parameters() if p.requires_grad)


def _count_steps(settings: Settings) -> dict[str, int]:
    """Return numbers of images and steps; empty where neither the data nor data.samples is given."""
    samples = settings.data.samples
    if settings.data.train:
        train = open_data(settings.data.train, tolerate=settings.data.on_bad == "skip")
        with_statistics(settings, train)
        samples = len(train)
    if not samples:
        return {}
    epoch = steps_per_epoch(samples, settings.data.batch)
    if not epoch:
        raise InputError(f"data.batch {settings.data.batch}: more than the {samples} images: choose at most {samples}")
    return {"samples": samples, "steps_an_epoch": epoch, "steps": epoch * settings.optim.epochs}


def _print(settings: Settings, estimates: dict[str, Any]) -> None:
    table = Table(title=f"{settings.objective}, {settings.model.arch}", show_header=False)
    for name in ("backbone", "projector", "predictor", "trained"):
        if name in estimates:
            table.add_row(f"parameters, {name}", f"{estimates[name]:,}")
    data = settings.data
    table.add_row(
        "views", f"{data.augmentation}, changed by {json.dumps(data.views)}" if data.views else data.augmentation
    )
    table.add_row("normalization", f"mean {data.mean}, standard deviation {data.std}")
    table.add_row("FLOPs a pair", f"{estimates['flops_a_pair'] / 1e9:.2f} G")
    table.add_row("activations a pair", f"{estimates['activation_bytes_a_pair'] / 2**20:.1f} MiB")
    memory = ", ".join(f"{n}: {binary(size)}" for n, size in estimates["memory"].items())
    table.add_row("memory, by world size (estimate)", memory or "no world size divides the batch")
    table.add_row("peak learning rate", f"{peak_rate(settings.optim, settings.data.batch):g}")
    if "steps" in estimates:
        steps = f"{estimates['steps']:,} ({counted(settings.optim.epochs, 'epoch')} of {estimates['steps_an_epoch']:,})"
        table.add_row("steps", f"{steps}, {estimates['samples']:,} images in batches of {settings.data.batch}")
    else:
        table.add_row("steps", "unknown: give --data.train F.beton, or --data.samples N")
    Console().print(table)
