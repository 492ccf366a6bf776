"""Backends: records to cropped, resized and flipped uint8 views. A file each, with a `build`, found by its name."""

import importlib

from pipeline.backends.base import Backend, BackendConfig
from pipeline.beton import Beton
from pipeline.system.errors import InputError
from pipeline.system.packages import installed

BACKENDS = ("ffcv", "ffcv_gpu", "dali", "resident")


def build(name: str, beton: Beton, config: BackendConfig) -> Backend:
    """Return backend `name`. Raises InputError for an unknown name, or data that this backend cannot read."""
    if name not in BACKENDS:
        raise InputError(f"data.backend {name!r} is not one of {', '.join(BACKENDS)}: choose one of these")
    if not beton.in_one_file and name != "dali":
        raise InputError(
            f"data.backend {name!r}: {beton.path} is not one file, which only dali reads directly: choose dali, or "
            "write a beton with python -m pipeline.prepare"
        )
    if name == "dali" and not installed("nvidia.dali"):
        raise InputError("data.backend 'dali': DALI is not installed: pip install nvidia-dali-cuda130, or choose auto")
    return importlib.import_module(f"pipeline.backends.{name}").build(beton, config)
