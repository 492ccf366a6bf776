"""Device, precision and process group: Accelerate's handle."""

import contextlib
import os
import platform
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import parse_flag_from_env
from torch import distributed, nn

from engine.config.settings import Settings
from engine.parallel.consensus import run_on_all_ranks
from engine.parallel.cpu_threads import share_of_cores
from engine.parallel.rendezvous import local_rank, rank, store, world
from pipeline.system.driver import explain_missing_cuda, has_gpu
from pipeline.system.errors import InputError

logger = get_logger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtype of the views by precision: the encoder rounds to it."""
_NCCL_EXTRA_SECONDS = 30.0  # NCCL ends the process without a message: the heartbeat names the lost rank before that


class DeviceChoice(NamedTuple):
    """The device and the precision that a rank computes with."""

    on_gpu: bool
    precision: str

    def facts(self) -> dict[str, str]:
        """Return device and precision, which have to be the same on all ranks."""
        return {"device": "GPU" if self.on_gpu else "CPU", "precision": self.precision}


def choose_device(settings: Settings, *, emulate: bool = False) -> DeviceChoice:
    """Return this rank's device and precision. Raises InputError where its machine cannot serve the settings.

    The precision is `no` on a CPU without bfloat16 instructions, where torch emulates it many times slower than
    float32. emulate: for a dry run, which needs no GPU, and keeps bf16 on any CPU.
    """
    on_cpu = settings.cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    on_gpu = torch.cuda.is_available() and not on_cpu
    if not on_cpu and not on_gpu and not emulate:
        _refuse_missing_gpu(settings)
    if on_gpu and local_rank() >= torch.cuda.device_count():
        raise InputError(
            f"{torch.cuda.device_count()} GPUs on {platform.node()} for {local_rank() + 1} ranks or more: start one "
            "rank a GPU"
        )
    if settings.precision == "fp16" and not on_gpu:
        raise InputError("precision 'fp16': needs a GPU: choose bf16 or no")
    if settings.precision == "bf16" and on_gpu and not bfloat16_on_gpu():
        raise InputError("precision 'bf16': this GPU does not have it: choose fp16 or no")
    slow = settings.precision == "bf16" and not on_gpu and not emulate and not bfloat16_on_cpu()
    return DeviceChoice(on_gpu, "no" if slow else settings.precision)


def _refuse_missing_gpu(settings: Settings) -> None:
    """Raise InputError where CUDA does not answer although there is a GPU, or the recipe or launcher asks for one."""
    if has_gpu():
        problem, remedy = explain_missing_cuda(str(torch.__version__), torch.version.cuda)
        raise InputError(f"{problem}: {remedy}; or add --cpu to compute on the CPU")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # `accelerate launch` sets it
    if settings.require_gpu or launched:
        source = "require_gpu true" if settings.require_gpu else "accelerate launch"
        raise InputError(f"{source}: no GPU on this machine: choose one that has, or add --cpu to compute on the CPU")


def build_accelerator(settings: Settings, choice: DeviceChoice | None = None, *, emulate: bool = False) -> Accelerator:
    """Return Accelerate's handle on device, process group and precision.

    choice: one that all ranks have agreed on; by default they agree here on `choose_device`, which raises InputError.
    """
    choice = choice or run_on_all_ranks(lambda: choose_device(settings, emulate=emulate), DeviceChoice.facts)
    timeout = _timeout(settings, choice.on_gpu)
    if world() > 1 and not distributed.is_initialized():
        backend, group_store = "nccl" if choice.on_gpu else "gloo", distributed.PrefixStore("group", store())
        distributed.init_process_group(backend, timeout=timeout, store=group_store, rank=rank(), world_size=world())
    gradients = DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=settings.micro_batches(world())
        == 1,  # with several backward passes, only the last one all-reduces
    )
    threads = contextlib.nullcontext() if choice.on_gpu else share_of_cores()
    with threads, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Accelerator(
            cpu=settings.cpu or not choice.on_gpu,
            mixed_precision=choice.precision,
            kwargs_handlers=[gradients, InitProcessGroupKwargs(timeout=timeout)],
        )


def _timeout(settings: Settings, on_gpu: bool) -> timedelta:
    return timedelta(seconds=settings.collective_timeout + (_NCCL_EXTRA_SECONDS if on_gpu else 0))


def new_group(settings: Settings, device: torch.device) -> distributed.ProcessGroup | None:
    """Return a process group of all ranks with a communicator of its own; None for one rank. Called by all ranks."""
    return distributed.new_group(timeout=_timeout(settings, device.type == "cuda")) if world() > 1 else None


def warn_of_precision(requested: str, accelerator: Accelerator) -> None:
    """Warn where the precision is not the requested one."""
    if accelerator.mixed_precision != requested:
        reason = "this processor has no instructions for it: computing in float32, as precision no"
        logger.warning(f"precision {requested}: {reason}")


def bfloat16_on_gpu() -> bool:
    """Return whether this rank's GPU computes in bfloat16 (Ampere and later) without emulation."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def bfloat16_on_cpu() -> bool:
    """Return whether this processor multiplies in bfloat16: AVX-512 BF16, or AMX. Others emulate it, slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def tune_convolutions(device: torch.device) -> None:
    """On a GPU, have cuDNN time its algorithms at a convolution's first call of each size, and use the fastest.

    Not in torch's deterministic mode: the fastest may be another in the next run.
    """
    deterministic = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic


@contextlib.contextmanager
def untuned_convolutions() -> Iterator[None]:
    """Suspend `tune_convolutions`, for batches of sizes that come once."""
    tuned = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tuned


def now(device: torch.device) -> float:
    """Return the seconds of `time.perf_counter` once the device has finished all its work. Waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer as Accelerate wraps them for its process group and precision."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # older torch needs it
        return accelerator.prepare(model, optimizer)
