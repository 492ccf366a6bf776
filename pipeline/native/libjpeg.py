"""The function of jpeg.c, which is built at installation where libjpeg-turbo's headers are installed."""

import ctypes
from typing import Any

from numba import types

from pipeline.native.numba_cache import external

decode_rectangle: Any = None
"""`decode_rectangle(data, size, image_height, image_width, top, left, height, width, out)`; 0 unless it errs or warns.

data and out are addresses. It is called without the GIL. None where it was not built: JPEGs are then decoded in full.
"""
decode_rectangle_symbol: Any = None
"""The same for compiled code."""

try:
    from pipeline.native import _jpeg  # type: ignore[attr-defined]
except ImportError:
    pass
else:
    decode_rectangle = ctypes.CDLL(_jpeg.__file__).decode_rectangle
    decode_rectangle.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 6, ctypes.c_void_p]
    decode_rectangle.restype = ctypes.c_int
    _signature = types.int32(types.uintp, types.uint64, *[types.int32] * 6, types.uintp)
    decode_rectangle_symbol = external("millrace_decode_rectangle", decode_rectangle, _signature)
