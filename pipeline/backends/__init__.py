"""Backends: records to cropped, resized and flipped uint8 views. One file each, one `build` each, found by name."""

from __future__ import annotations

import importlib

from pipeline.backends.base import Backend, Wanted
from pipeline.beton import Beton
from pipeline.system.errors import InputError

BACKENDS = ("ffcv", "ffcv_gpu", "dali", "resident")


def build(name: str, beton: Beton, wanted: Wanted) -> Backend:
    """Return backend `name`. Raises InputError where there is none of that name, or it cannot read this data."""
    if name not in BACKENDS:
        raise InputError(f"data.backend {name!r} is not one of {', '.join(BACKENDS)}: choose one of these")
    if not beton.in_one_file and name != "dali":
        raise InputError(
            f"data.backend {name!r}: {beton.path} is not one file, which only dali reads directly: choose dali, or "
            "write a beton with python -m pipeline.prepare"
        )
    return importlib.import_module(f"pipeline.backends.{name}").build(beton, wanted)
