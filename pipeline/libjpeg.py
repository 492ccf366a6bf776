"""jpeg.c's function, for compiled code; it is built at installation, where libjpeg-turbo's headers are at hand."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["decode_rectangle"]

decode_rectangle: Any = None
"""`decode_rectangle(data, size, image_height, image_width, top, left, height, width, out)`; 0 unless it errs or warns.

data and out are addresses. None where it was not built: JPEGs are decoded whole then. It is called without the GIL.
"""

try:
    from pipeline import _jpeg  # type: ignore[attr-defined]
except ImportError:
    pass
else:
    decode_rectangle = ctypes.CDLL(_jpeg.__file__).decode_rectangle
    decode_rectangle.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 6, ctypes.c_void_p]
    decode_rectangle.restype = ctypes.c_int
