"""Encoders, queue, objective, optimizer and step of a run."""

import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch import nn

from engine.config.settings import Settings
from engine.optim.optimizer import build_optimizer
from engine.optim.schedule import Schedule
from engine.parallel import collectives
from engine.parallel.accelerator import tune_convolutions
from engine.parallel.consensus import run_on_all_ranks
from engine.parallel.rendezvous import world
from engine.parallel.sync_batchnorm import synchronize
from engine.training.step import Step
from methods.custom import BackboneError, CustomBackbone, is_custom
from methods.encoders import place
from methods.heads import Encoder
from methods.momentum import momentum_copy
from methods.norm import GROUPS
from methods.queue import KeyQueue
from methods.recompute import recompute
from methods.registry import Backbone, build_backbone, build_encoder, build_objective
from pipeline.system.errors import InputError
from pipeline.system.packages import installed

logger = get_logger(__name__)


@dataclass
class Model:
    """The trained modules, and the step that trains them."""

    online: nn.Module
    """The online encoder, as Accelerate has wrapped it."""
    target: Encoder | None
    """The momentum encoder."""
    queue: KeyQueue | None
    optimizer: Any
    step: Step


def build_model(settings: Settings, accelerator: Accelerator, steps_per_epoch: int = 1) -> Model:
    """Build encoders, queue, objective, optimizer, schedules and step, with weights from the settings' seed."""
    set_seed(settings.seed)
    base, device = settings.base, accelerator.device
    tune_convolutions(device)
    online = _build_online(settings)
    if settings.model.bn == "sync":
        synchronize(online)
    place(online, device)
    collectives.broadcast_parameters(online)
    if is_custom(settings.model.arch):  # whose buffers may be drawn
        collectives.broadcast_buffers(online)
    target = momentum_copy(online) if base.momentum_encoder else None
    if settings.compile:
        _compile(online, target, device)
    queue = None
    if base.queue:
        method, dim = settings.method, settings.model.dim
        assert method.queue_size is not None
        assert dim is not None
        queue = KeyQueue(method.queue_size, dim, settings.seed, getattr(torch, method.queue_dtype)).to(device)
    if settings.gradient_dtype == "bfloat16" and world() == 1:
        logger.warning("gradient_dtype bfloat16: there is one rank, and nothing to exchange")
    # Not DistributedDataParallel: the step averages the gradients itself (engine/parallel/gradients.py).
    wrapped = accelerator.prepare_model(online, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(build_optimizer(online, settings.optim))
    schedule = Schedule(settings, steps_per_epoch, device)
    step = Step(settings, accelerator, wrapped, target, queue, optimizer, schedule)
    return Model(wrapped, target, queue, optimizer, step)


def _build_online(settings: Settings) -> Encoder:
    """Return the online encoder, on the CPU; its BatchNorm groups are parts of the samples of one forward pass."""
    model = settings.model
    assert model.dim is not None
    assert model.bn is not None
    groups = max(1, GROUPS // (settings.micro_batches(world()) * (world() if model.bn == "shuffle" else 1)))
    backbone = _agreed_backbone(settings, groups) if is_custom(model.arch) else _build_backbone(settings, groups)
    if settings.activation_checkpointing:
        recompute(backbone)
    return build_encoder(settings.base, backbone, dim=model.dim, mlp_dim=model.mlp_dim, bn=model.bn, groups=groups)


def _agreed_backbone(settings: Settings, groups: int) -> Backbone:
    """Return a backbone of other code, once all ranks have built the same. Raises InputError."""

    def shapes(backbone: Backbone) -> dict[str, Any]:
        return {f"model.arch: {name}": list(value.shape) for name, value in backbone.state_dict().items()}

    return run_on_all_ranks(lambda: _build_backbone(settings, groups), shapes)


def _build_backbone(settings: Settings, groups: int) -> Backbone:
    model = settings.model
    assert model.bn is not None
    try:
        backbone = build_backbone(
            model.arch,
            args=model.args,
            stem=model.stem,
            width=model.width,
            bn=model.bn,
            groups=groups,
            zero_init_residual=bool(model.zero_init_residual),
            size=settings.data.size,
            stop_grad_conv1=model.stop_grad_conv1,
        )
        if isinstance(backbone, CustomBackbone):
            for size in settings.data.sizes:
                backbone.check(size)
    except BackboneError as error:
        raise InputError(f"model.arch {model.arch}: {error}") from error.__cause__
    return backbone


def _compile(online: Encoder, target: Encoder | None, device: torch.device) -> None:
    """Compile the backbones with torch.compile, once for each size of the views."""
    check_compiler(device)
    torch._dynamo.config.recompile_limit = 64  # one for each encoder and size of the views
    for encoder in (online, target):
        if encoder is not None:
            encoder.backbone.compile(dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile lacks Triton or a C++ compiler."""
    if device.type == "cuda" and not installed("triton"):
        raise InputError("compile true: triton is not installed: pip install triton, or choose compile false")
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise InputError("compile true: there is no C++ compiler: install g++, or choose compile false")


def needed_views(settings: Settings, kinds: str = "qQkK") -> set[int]:
    """Return the indices of the views whose embeddings of those kinds the objective needs."""
    needs = build_objective(settings.base, settings.terms).needs
    return {int(name[1]) - 1 for name in needs if name[0] in kinds}
