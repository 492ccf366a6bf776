"""Encoders, queue, objective, optimizer and step of a run."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from engine.config.settings import Settings
from engine.optim.optimizer import build_optimizer
from engine.optim.schedule import Schedule
from engine.parallel import collectives
from engine.parallel.accelerator import prepared
from engine.parallel.sync_batchnorm import synchronize
from engine.training.step import Step
from methods.encoders import place
from methods.heads import Encoder
from methods.momentum import momentum_copy
from methods.norm import GROUPS
from methods.queue import KeyQueue
from methods.recompute import recompute
from methods.registry import build_backbone, build_encoder, build_objective
from pipeline.system.errors import InputError
from pipeline.system.packages import installed


@dataclass
class Model:
    """What is trained, and the step that trains it."""

    online: nn.Module
    """As Accelerate wrapped it."""
    target: Encoder | None
    queue: KeyQueue | None
    optimizer: Any
    step: Step


def build_model(settings: Settings, accelerator: Accelerator, steps_an_epoch: int = 1) -> Model:
    """Build encoders, queue, objective, optimizer, schedules and step, weights from the settings' seed."""
    set_seed(settings.seed)
    base, device = settings.base, accelerator.device
    accumulate = settings.parts(accelerator.num_processes)
    online = _online(settings, accelerator, accumulate)
    if settings.model.bn == "sync" and accelerator.num_processes > 1:
        synchronize(online, device)
    target = place(momentum_copy(online), device) if base.momentum_encoder else None
    place(online, device)
    if settings.compile:
        _compile(online, target, device)
    queue = _queue(settings, device) if base.queue else None
    wrapped, optimizer = prepared(accelerator, online, build_optimizer(online, settings.optim))
    if settings.gradient_dtype == "bfloat16":
        _exchange_in_bfloat16(wrapped)
    step = Step(
        accelerator,
        wrapped,
        target,
        queue,
        build_objective(base, settings.terms),
        optimizer,
        Schedule(settings, steps_an_epoch, device),
        accumulate=accumulate,
        clip=settings.optim.clip_grad_norm,
        gradient_shares=settings.gradient_shares,
        graph=settings.cuda_graph,
    )
    return Model(wrapped, target, queue, optimizer, step)


def _online(settings: Settings, accelerator: Accelerator, accumulate: int) -> Encoder:
    """Return the online encoder, on the CPU; its BatchNorm's groups are those of a part of a process's batch."""
    model = settings.model
    assert model.dim is not None
    assert model.bn is not None
    parts = accelerator.num_processes * accumulate if model.bn == "shuffle" else accumulate
    groups = max(1, GROUPS // parts)
    backbone = build_backbone(
        model.arch,
        stem=model.stem,
        width=model.width,
        bn=model.bn,
        groups=groups,
        zero_init_residual=bool(model.zero_init_residual),
        size=settings.data.size,
        stop_grad_conv1=model.stop_grad_conv1,
    )
    if settings.activation_checkpointing:
        recompute(backbone)
    return build_encoder(settings.base, backbone, dim=model.dim, mlp_dim=model.mlp_dim, bn=model.bn, groups=groups)


def _compile(online: Encoder, target: Encoder | None, device: torch.device) -> None:
    """Have torch.compile compile the backbones, once for each size of the views."""
    check_compiler(device)
    torch._dynamo.config.recompile_limit = 64  # one for each encoder and size of the views
    for encoder in (online, target):
        if encoder is not None:
            encoder.backbone.compile(dynamic=False)


def _queue(settings: Settings, device: torch.device) -> KeyQueue:
    method, dim = settings.method, settings.model.dim
    assert method.queue_size is not None
    assert dim is not None
    return KeyQueue(method.queue_size, dim, settings.seed, getattr(torch, method.queue_dtype)).to(device)


def _exchange_in_bfloat16(wrapped: nn.Module) -> None:
    """Have processes exchange gradients in bfloat16; say so where there is one alone, and nothing to exchange."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.register_comm_hook(None, lambda _, bucket: collectives.mean_in_bfloat16(bucket))
    else:
        print("warning: gradient_dtype bfloat16: there is one process, and nothing to exchange", file=sys.stderr)


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile has nothing to compile with."""
    if device.type == "cuda" and not installed("triton"):
        raise InputError("compile true: triton is not installed: pip install triton, or choose compile false")
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise InputError("compile true: there is no C++ compiler: install g++, or choose compile false")


def needed_views(settings: Settings, kinds: str = "qQkK") -> set[int]:
    """Return the indices of the views whose embeddings are needed, of those kinds."""
    needs = build_objective(settings.base, settings.terms).needs
    return {int(name[1]) - 1 for name in needs if name[0] in kinds}
