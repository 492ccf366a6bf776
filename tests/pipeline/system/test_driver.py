"""The reason for which CUDA does not answer is named, on faked machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.system import driver
from pipeline.system.driver import driver_version, explain_missing_cuda, has_gpu

PROC = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """The driver's two files, which do not exist yet."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(driver, "_VERSION_FILES", (tmp_path / "proc", tmp_path / "sys"))
    return tmp_path / "proc", tmp_path / "sys"


def test_a_device_file_shows_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "_DEVICES", str(tmp_path / "nvidia[0-9]*"))
    (tmp_path / "nvidiactl").touch()  # also without a GPU
    assert not has_gpu()
    (tmp_path / "nvidia3").touch()
    assert has_gpu()


def test_version_of_the_driver(files: tuple[Path, Path]) -> None:
    proc, sys = files
    assert driver_version() == ""
    sys.write_text("580.65.06\n")
    assert driver_version() == "580.65.06"
    for text, version in ((PROC, "535.104.05"), (OPEN, "570.86.15"), ("nothing known", "580.65.06")):
        proc.write_text(text)
        assert driver_version() == version


@pytest.mark.parametrize(
    ("version", "cuda", "problem"),
    [
        (
            "535.104.05",
            "13.0",
            "NVIDIA driver 535.104.05 is too old: torch 2.13.0 is built for CUDA 13.0, which needs 580 or later",
        ),
        (
            "470.256.02",
            "12.8",
            "NVIDIA driver 470.256.02 is too old: torch 2.13.0 is built for CUDA 12.8, which needs 525 or later",
        ),
        ("580.65.06", "13.0", "CUDA does not answer: torch 2.13.0 is built for CUDA 13.0, NVIDIA driver 580.65.06"),
        (
            "",
            "13.0",
            "CUDA does not answer: torch 2.13.0 is built for CUDA 13.0, NVIDIA driver of unknown version",
        ),
        ("535.104.05", None, "torch 2.13.0 is built without CUDA"),
    ],
)
def test_problem_is_named(files: tuple[Path, Path], version: str, cuda: str | None, problem: str) -> None:
    files[1].write_text(version)
    found, remedy = explain_missing_cuda("2.13.0", cuda)
    assert found == problem
    too_old = "install driver 580 or later, or a torch built for CUDA 12 or earlier"
    assert (remedy == too_old) == (version.startswith("535") and cuda is not None)


@pytest.mark.parametrize(("hidden", "shown"), [("", "empty"), ("-1", "-1")])
def test_hidden_gpus_are_named(
    files: tuple[Path, Path], hidden: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert explain_missing_cuda("2.13.0", "13.0") == (
        f"CUDA_VISIBLE_DEVICES is {shown}, which hides all GPUs",
        "unset CUDA_VISIBLE_DEVICES",
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "CUDA does not answer" in explain_missing_cuda("2.13.0", "13.0")[0]
