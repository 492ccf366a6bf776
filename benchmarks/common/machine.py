"""The machine that a benchmark ran on."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.system.cores import available_cores
from pipeline.system.packages import version

PACKAGES = ("torch", "ffcv", "numba", "numpy", "pillow", "accelerate", "nvidia-dali-cuda130", "lightly")


def describe() -> dict[str, Any]:
    """Return date, processor, cores, load, GPU and versions."""
    versions = {package: version(package) or "none" for package in PACKAGES}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "processor": _processor(),
        "cores": available_cores(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **versions},
    }


def hardware(about: dict[str, Any]) -> str:
    """Return the hardware of a description in one line."""
    return f"{about['processor']}, {about['cores']} cores, load {about['load']}, {about['gpu'] or 'no GPU'}"


def versions(about: dict[str, Any]) -> str:
    """Return the installed versions of a description in one line."""
    return ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number != "none")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
