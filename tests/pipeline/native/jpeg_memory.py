"""Damaged JPEGs decoded by jpeg.c and by FFCV's function under valgrind: python -m tests.pipeline.native.jpeg_memory

Memcheck sees every access, also those of libjpeg-turbo and its SIMD code; AddressSanitizer would only see jpeg.c. Makes
`--count` JPEGs from `--first` on with `tests.pipeline.fuzz` and decodes them in a plain Python process, from and to
buffers of exactly their size. Exit status 0 where no access was out of bounds.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.native import libjpeg
from pipeline.storage.decode import jpeg_frame
from tests.pipeline.conftest import saved
from tests.pipeline.fuzz import damaged_jpeg

KINDS: dict[str, dict[str, object]] = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "optimized": {"optimize": True, "quality": 98},
}
CASE = struct.Struct("<IIIIIII")  # bytes, height, width, top, left, height, width
DECODE = """
import ctypes, struct, sys

jpeg, ffcv = ctypes.CDLL(sys.argv[1]).decode_rectangle, ctypes.CDLL(sys.argv[2]).imdecode
jpeg.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 6, ctypes.c_void_p]
ffcv.argtypes = [ctypes.c_void_p, ctypes.c_uint64, *[ctypes.c_uint32] * 2, ctypes.c_void_p, *[ctypes.c_uint32] * 6]
ffcv.argtypes += [ctypes.c_bool] * 2
case, cases = struct.Struct("<IIIIIII"), open(sys.argv[3], "rb").read()
at = done = whole = 0
while at < len(cases):
    size, height, width, *box = case.unpack_from(cases, at)
    data = (ctypes.c_uint8 * size).from_buffer_copy(cases, at + case.size)
    at += case.size + size
    out = (ctypes.c_uint8 * (3 * box[2] * box[3]))()
    whole += jpeg(data, size, height, width, *box, out) == 0
    out = (ctypes.c_uint8 * (3 * height * width))()
    ffcv(data, size, height, width, out, height, width, 0, 0, 1, 1, False, False)
    done += 1
print(f"{done} damaged JPEGs, of which {whole} decode: 0 accesses out of bounds")
"""


def cases(first: int, count: int) -> Iterator[bytes]:
    """Yield damaged JPEGs with the sides of their frame headers and a rectangle, in the format of CASE."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    files = [saved(picture, **kind) for kind in KINDS.values()] + [
        saved(picture.convert("L")),
        saved(picture.convert("CMYK")),
    ]
    for number in range(first, first + count):
        draw = random.Random(number)
        data = damaged_jpeg(draw, draw.choice(files)) if number % 10 else draw.choice(files)
        height, width = (int(side) for side in jpeg_frame(np.frombuffer(data, np.uint8))[:2])
        if not 0 < height * width <= 1 << 20:
            height, width = 61, 97
        top, left = draw.randrange(height), draw.randrange(width) // 16 * 16
        box = top, left, draw.randint(1, height - top), width - left
        yield CASE.pack(len(data), height, width, *box) + data


def check(first: int, count: int) -> subprocess.CompletedProcess[str]:
    """Decode them under valgrind; return the process, of status 0 where no access was out of bounds."""
    import ffcv._libffcv

    assert libjpeg.decode_rectangle is not None
    libraries = [libjpeg._jpeg.__file__, ffcv._libffcv.__file__]  # type: ignore[attr-defined]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(cases(first, count)))
        file.flush()
        call = ["valgrind", "--error-exitcode=9", "--undef-value-errors=no", "--leak-check=no", "--quiet"]
        call += [sys.executable, "-S", "-c", DECODE, *libraries, file.name]
        environment = os.environ | {"PYTHONMALLOC": "malloc"}
        return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pipeline.native.jpeg_memory")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    done = check(args.first, args.count)
    print(done.stdout, done.stderr, sep="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
