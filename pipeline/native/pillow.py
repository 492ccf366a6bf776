"""Pillow's JPEG decoder for compiled code, where neither jpeg.c nor FFCV is there: slower, as it takes the GIL."""

import ctypes
import io
from typing import Any

from numba import types
from PIL import Image

from pipeline.native.numba_cache import external
from pipeline.system.limits import MAX_SCANNED_PIXELS, MAX_SCANS

_SCAN_MARKER = b"\xff\xda"


def _decode(
    data: int, size: int, image_height: int, image_width: int, top: int, left: int, height: int, width: int, out: int
) -> int:
    """Decode as `decode_rectangle` of `pipeline.native.libjpeg` does. Errors may not leave a callback."""
    try:
        encoded = ctypes.string_at(data, size)
        scans = encoded.count(_SCAN_MARKER)
        image = Image.open(io.BytesIO(encoded), formats=("JPEG",))
        if image.size != (image_width, image_height) or image.mode not in ("RGB", "L"):
            return 1
        if scans > MAX_SCANS or scans * image_width * image_height > MAX_SCANNED_PIXELS:
            return 1
        pixels = image.convert("RGB").crop((left, top, left + width, top + height)).tobytes()
        ctypes.memmove(out, pixels, len(pixels))
    except Exception:  # of any kind: Pillow's decoders were not written for hostile bytes
        return 1
    return 0


_types = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 6, ctypes.c_void_p)
_callback = ctypes.CFUNCTYPE(ctypes.c_int, *_types)(_decode)
decode_rectangle_symbol: Any = external(
    "millrace_pillow_rectangle",
    _callback,
    types.int32(types.uintp, types.uint64, *[types.int32] * 6, types.uintp),
)
"""`decode_rectangle` of `pipeline.native.libjpeg` for compiled code."""
