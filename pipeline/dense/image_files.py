"""Single image files, by PIL: their headers and their pixels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pipeline.system.errors import InputError


def header(file: Path) -> Image.Image:
    """Return an image whose size and mode are known, and nothing else. Raises InputError where it cannot be read."""
    try:
        with Image.open(file) as opened:
            return opened
    except Exception as error:  # PIL's readers raise whatever a damaged file makes them stumble over
        raise InputError(f"{file}: cannot be read ({error}): replace it, or leave it out") from None


def decoded(file: Path) -> Image.Image:
    """Return an image with its pixels. Raises InputError where it cannot be decoded."""
    try:
        with Image.open(file) as opened:
            opened.load()
            return opened
    except Exception as error:  # as above
        raise InputError(f"{file}: cannot be decoded ({error}): replace it, or leave it out") from None
