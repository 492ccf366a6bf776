"""Which Python packages are installed, and in what versions; nothing is imported to find out."""

from __future__ import annotations

import importlib.util
from importlib import metadata


def installed(module: str) -> bool:
    """Return whether there is a module of that name, such as `nvidia.dali`."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what stands before a dot
        return False


def version(package: str) -> str | None:
    """Return a package's version by the name that pip knows it by; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
