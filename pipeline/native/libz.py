"""zlib's CRC32 for compiled code, which cannot call Python's `zlib`."""

import ctypes
import zlib
from typing import Any

from numba import types

from pipeline.native.numba_cache import external


def _crc32() -> Any:
    """Return the function of the library that Python's module is linked to, or else of the system's."""
    for library in (getattr(zlib, "__file__", None), None, "libz.so.1"):
        try:
            return ctypes.CDLL(library).crc32
        except (OSError, AttributeError):
            continue
    raise ImportError("libz.so.1 is not installed: apt-get install zlib1g")


crc32 = external("millrace_crc32", _crc32(), types.uint64(types.uint64, types.uintp, types.uint32))
"""`crc32(begin, address, size)`."""
