"""Why CUDA does not answer on a machine that has a GPU. This module needs no package."""

import contextlib
import glob
import os
import re
from pathlib import Path

_DEVICES = "/dev/nvidia[0-9]*"
_VERSION_FILES = (Path("/proc/driver/nvidia/version"), Path("/sys/module/nvidia/version"))
_MIN_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest major version of the NVIDIA driver for Linux, by CUDA's major version (CUDA's release notes, table 2)."""


def has_gpu() -> bool:
    """Return whether the NVIDIA driver has made a device file."""
    return bool(glob.glob(_DEVICES))


def driver_version() -> str:
    """Return the version of the loaded NVIDIA driver, such as 580.65.06; empty: unknown."""
    for path in _VERSION_FILES:
        with contextlib.suppress(OSError):
            if version := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", path.read_text()):
                return version[0]
    return ""


def explain_missing_cuda(torch: str, cuda: str | None) -> tuple[str, str]:
    """Return why CUDA does not answer, and the remedy, on a machine that has a GPU.

    torch, cuda: the versions `torch.__version__` and `torch.version.cuda`; None: a build for CPUs.
    """
    if cuda is None:
        return f"torch {torch} is built without CUDA", (
            "point pip at an index that has a CUDA build of torch; rm -rf .venv; ./millrace setup"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {hidden or 'empty'}, which hides all GPUs", "unset CUDA_VISIBLE_DEVICES"
    version, major = driver_version(), int(cuda.split(".")[0])
    needed, built = _MIN_DRIVERS.get(major, 0), f"torch {torch} is built for CUDA {cuda}"
    if version and int(version.split(".")[0]) < needed:
        remedy = f"install driver {needed} or later, or a torch built for CUDA {major - 1} or earlier"
        return f"NVIDIA driver {version} is too old: {built}, which needs {needed} or later", remedy
    return f"CUDA does not answer: {built}, NVIDIA driver {version or 'of unknown version'}", (
        "check that nvidia-smi works, and that CUDA_VISIBLE_DEVICES is unset or right"
    )
