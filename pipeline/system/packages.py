"""Installed Python packages and their versions, found without importing them."""

import importlib.util
from importlib import metadata


def installed(module: str) -> bool:
    """Return whether a module such as `nvidia.dali` is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def version(package: str) -> str | None:
    """Return a package's version by its name for pip; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
