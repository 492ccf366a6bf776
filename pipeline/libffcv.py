"""FFCV's file types and compiled C functions, imported without its side effects.

Importing ffcv sets torch's and numba's thread counts to one for the whole process; both are put back here. It also
compiles a numba dictionary of two entries, for seconds; a plain one serves. Every other module of the project takes
what it needs of FFCV from this one.
"""

from __future__ import annotations

import ctypes

import numba
import numba.typed
import torch

_torch_threads, _numba_threads, _typed_dict = torch.get_num_threads(), numba.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict

from ffcv.fields import IntField, RGBImageField  # noqa: E402
from ffcv.libffcv import imdecode, lib  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.types import (  # noqa: E402
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)

numba.typed.Dict = _typed_dict
torch.set_num_threads(_torch_threads)
numba.set_num_threads(_numba_threads)

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "JPEG",
    "RAW",
    "TYPE_ID_HANDLER",
    "FieldDescType",
    "HeaderType",
    "IntField",
    "RGBImageField",
    "crc32",
    "decode_jpeg",
    "get_metadata_type",
]

JPEG, RAW = 0, 1  # a record's `mode`

decode_jpeg = Compiler.compile(imdecode)
"""Compiled `imdecode(source, destination, height, width, ...)`: libjpeg-turbo to RGB; 0 unless it errs or warns."""

crc32 = lib.crc32  # zlib's, which FFCV's library is linked with: callable from compiled code without the GIL
crc32.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint32]
crc32.restype = ctypes.c_uint64
