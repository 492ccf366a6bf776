"""FFCV's JPEG decoder, where FFCV is installed, imported without side effects.

`import ffcv` sets torch's and numba's thread counts to one for the process; both are restored here. It also compiles a
numba dictionary of two entries, which takes seconds; a plain dictionary replaces it. All other modules take what they
need of FFCV from this one.
"""

from typing import Any

import numba
import numba.typed
import torch
from numba import types

from pipeline.native.numba_cache import compiled, external

_torch_threads, _numba_threads, _typed_dict = torch.get_num_threads(), numba.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
try:
    from ffcv.libffcv import lib
except ImportError:
    lib = None
numba.typed.Dict = _typed_dict
torch.set_num_threads(_torch_threads)
numba.set_num_threads(_numba_threads)

decode_jpeg: Any = None
"""`decode_jpeg(source, pixels, height, width)`, compiled; None without FFCV."""

if lib is not None:
    _imdecode = external(
        "millrace_imdecode",
        lib.imdecode,
        types.int32(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 8),
    )

    @compiled(nogil=True, boundscheck=False)
    def decode_jpeg(source: Any, pixels: Any, height: int, width: int) -> int:
        """Decode a JPEG, uint8 [size], of that size to `pixels`, uint8, RGB; return 0 unless it errs or warns.

        FFCV's library keeps 10 KB for each thread that has called it, also after the thread's end.
        """
        at, to = source.ctypes.data, pixels.ctypes.data
        return _imdecode(at, source.size, height, width, to, height, width, 0, 0, 1, 1, 0, 0)
