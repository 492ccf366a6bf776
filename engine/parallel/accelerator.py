"""The device that a process computes on, in which precision, and how processes are joined: Accelerate's handle."""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import is_wandb_available
from torch import distributed, nn

from engine.config.settings import Settings
from engine.parallel.consensus import together
from engine.parallel.rendezvous import rank, store, world
from pipeline.system.errors import InputError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Of views, by the precision: what the encoder rounds to."""
_LATER = 30.0  # seconds after which NCCL ends a process without a word: the heartbeat says before who was lost


def build_accelerator(settings: Settings, *, emulate: bool = False) -> Accelerator:
    """Return Accelerate's handle on device, processes and precision. Raises InputError for what is not there.

    Where a CPU has no instructions for bfloat16, which torch then emulates many times slower than float32, the
    precision is `no`, unless emulate: `warn_of_precision` says so, once nothing is left to refuse.
    """
    on_gpu, precision = together(lambda: _checked(settings, emulate), _facts)
    timeout = timedelta(seconds=settings.collective_timeout + (_LATER if on_gpu else 0))
    if world() > 1 and not distributed.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        meeting_place = distributed.PrefixStore("group", store())
        distributed.init_process_group(backend, timeout=timeout, store=meeting_place, rank=rank(), world_size=world())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Accelerator(
            cpu=settings.cpu or not on_gpu,
            mixed_precision=precision,
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_dir=settings.out,
            kwargs_handlers=[
                _exchange(settings),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )


def warn_of_precision(asked: str, accelerator: Accelerator) -> None:
    """Say, once, where another precision is computed in than the one asked for."""
    if accelerator.mixed_precision != asked and rank() == 0:
        says = "this processor has no instructions for it: computing in float32, as precision no"
        print(f"warning: precision {asked}: {says}", file=sys.stderr)


def _facts(found: tuple[bool, str]) -> dict[str, str]:
    on_gpu, precision = found
    return {"device": "GPU" if on_gpu else "CPU", "precision": precision}


def _checked(settings: Settings, emulate: bool) -> tuple[bool, str]:
    """Return whether this process trains on a GPU, and in which precision.

    Raises InputError for what its machine has not.
    """
    on_gpu = torch.cuda.is_available() and not settings.cpu
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local >= torch.cuda.device_count():
        raise InputError(
            f"{torch.cuda.device_count()} GPUs on {platform.node()} for {local + 1} processes or more: start one "
            "process a GPU"
        )
    if settings.precision == "fp16" and not on_gpu:
        raise InputError("precision 'fp16': needs a GPU: choose bf16 or no")
    if settings.precision == "bf16" and on_gpu and not bfloat16_on_gpu():
        raise InputError("precision 'bf16': this GPU does not have it: choose fp16 or no")
    if settings.tracker == "wandb" and not is_wandb_available():
        raise InputError("tracker 'wandb': the package is not installed: pip install wandb, or choose tensorboard")
    slow = settings.precision == "bf16" and not on_gpu and not emulate and not bfloat16_on_cpu()
    return on_gpu, "no" if slow else settings.precision


def bfloat16_on_gpu() -> bool:
    """Return whether this process's GPU computes in bfloat16, and does not emulate it (Ampere and later)."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def bfloat16_on_cpu() -> bool:
    """Return whether this processor computes convolutions in bfloat16 (AVX-512 or AMX), and does not emulate them."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def now(device: torch.device) -> float:
    """Return seconds of `time.perf_counter`, once the device has done all that it was given. Waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer as Accelerate wraps them for its processes and precision."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # older torch needs it
        return accelerator.prepare(model, optimizer)


def _exchange(settings: Settings) -> DistributedDataParallelKwargs:
    """Return how processes exchange gradients: in place, without buffers, and nothing looked for that never changes."""
    return DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=settings.parts(world()) == 1,  # not where only the last of several backward passes exchanges
    )
