"""Each rank's device and precision are checked before a process group is formed."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config.settings import Settings
from engine.parallel import accelerator
from engine.parallel.accelerator import (
    build_accelerator,
    choose_device,
    tune_convolutions,
    untuned_convolutions,
    warn_of_precision,
)
from engine.parallel.rendezvous import rank
from pipeline.system.errors import InputError
from tests.gloo import on_ranks

SETTINGS = Settings(precision="no", tracker="none")


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_a_processor_emulates_becomes_float32(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: native)
    handle = build_accelerator(replace(SETTINGS, precision="bf16", cpu=True))
    assert handle.mixed_precision == ("bf16" if native else "no")
    warn_of_precision("bf16", handle)
    line = "warning: precision bf16: this processor has no instructions for it: computing in float32, as precision no\n"
    assert capsys.readouterr().err == ("" if native else line)
    assert choose_device(replace(SETTINGS, precision="bf16", cpu=True), emulate=True) == (False, "bf16")


@pytest.mark.parametrize("flag", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_processor_has_bfloat16_by_either_extension(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain AVX-512, on which oneDNN too calls bfloat16 supported, emulates it."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not accelerator.bfloat16_on_cpu()
    monkeypatch.setattr(torch.cpu, flag, lambda: True)
    assert accelerator.bfloat16_on_cpu()


def test_gpu_that_emulates_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a V100 or T4, which torch by default calls supported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(InputError, match=r"precision 'bf16': this GPU does not have it: choose fp16 or no"):
        choose_device(Settings())
    assert choose_device(Settings(precision="fp16")) == (True, "fp16")


def lack_a_gpu(out: str) -> None:
    """Two ranks on a machine with one GPU."""
    del os.environ["ACCELERATE_USE_CPU"]
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_bf16_supported = lambda **_: True
    with pytest.raises(InputError) as raised:
        build_accelerator(SETTINGS)
    Path(out, f"{rank()}.txt").write_text(str(raised.value))


def test_rank_without_a_gpu_is_named_on_all(tmp_path: Path) -> None:
    on_ranks(2, lack_a_gpu, str(tmp_path))
    host = platform.node()
    message = f"rank 1 on {host}: 1 GPUs on {host} for 2 ranks or more: start one rank a GPU"
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(2)] == [message, message]


def lack_gpus(out: str) -> None:
    """Two machines, the second without a GPU."""
    os.environ["LOCAL_RANK"] = "0"
    del os.environ["ACCELERATE_USE_CPU"]
    torch.cuda.is_available = lambda: rank() == 0
    torch.cuda.device_count = lambda: 1 - rank()
    with pytest.raises(InputError) as raised:
        build_accelerator(SETTINGS)
    Path(out, f"{rank()}.txt").write_text(str(raised.value))


def test_machine_without_a_gpu_is_named_on_all(tmp_path: Path) -> None:
    on_ranks(2, lack_gpus, str(tmp_path))
    host = platform.node()
    message = f"device: rank 0 on {host} has 'GPU', rank 1 on {host} 'CPU': give all ranks the same"
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(2)] == [message, message]


def lack_cuda(out: str) -> None:
    """Two machines, the second with a driver that is too old."""
    os.environ["LOCAL_RANK"] = "0"
    del os.environ["ACCELERATE_USE_CPU"]
    torch.cuda.is_available = lambda: rank() == 0
    torch.cuda.device_count = lambda: 1 - rank()
    accelerator.has_gpu = lambda: True  # type: ignore[attr-defined]
    accelerator.explain_missing_cuda = lambda *_: ("driver 535 is too old", "install 580")  # type: ignore[attr-defined]
    with pytest.raises(InputError) as raised:
        build_accelerator(SETTINGS)
    Path(out, f"{rank()}.txt").write_text(str(raised.value))


def test_machine_with_an_old_driver_is_named_on_all(tmp_path: Path) -> None:
    on_ranks(2, lack_cuda, str(tmp_path))
    problem = "driver 535 is too old: install 580; or add --cpu to compute on the CPU"
    message = f"rank 1 on {platform.node()}: {problem}"
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(2)] == [message, message]


@pytest.mark.parametrize(
    ("require_gpu", "environment", "source"),
    [
        (False, {}, ""),
        (True, {}, "require_gpu true"),
        (False, {"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
        (True, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}, ""),
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_missing_gpu_is_refused_where_one_is_wanted(
    require_gpu: bool, environment: dict[str, str], source: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipe, by the launcher, or by a GPU without CUDA; not with --cpu, and not for a dry run."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accelerator, "has_gpu", lambda: gpu)
    monkeypatch.setattr(accelerator, "explain_missing_cuda", lambda *_: ("CUDA is silent", "mend it"))
    settings = replace(SETTINGS, require_gpu=require_gpu)
    assert choose_device(replace(settings, cpu=True)) == choose_device(settings, emulate=True) == (False, "no")
    problem = f"{source}: no GPU on this machine: choose one that has" if source else ""
    if gpu and "ACCELERATE_USE_CPU" not in environment:
        problem = "CUDA is silent: mend it; "
    if problem:
        with pytest.raises(InputError, match=f"^{problem},? ?or add --cpu to compute on the CPU$"):
            choose_device(settings)
    else:
        assert choose_device(settings) == (False, "no")


@pytest.mark.parametrize(
    ("device", "deterministic", "tuned"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_convolutions_are_tuned_for_training_on_a_gpu(
    device: str, deterministic: bool, tuned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tuned)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    tune_convolutions(torch.device(device))
    assert torch.backends.cudnn.benchmark == tuned
    with untuned_convolutions():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == tuned
