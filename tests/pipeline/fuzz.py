"""Betons and JPEGs with random changes in vulnerable places, each a pure function of its number, and their use."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.beton import Beton
from pipeline.inspect import describe, verify
from pipeline.loader import Loader
from pipeline.manifest import side_files
from pipeline.native.libffcv import decode_jpeg
from pipeline.native.libjpeg import decode_rectangle
from pipeline.storage.decode import jpeg_frame
from pipeline.storage.encode import Settings, Unreadable, encode
from pipeline.system.errors import InputError
from pipeline.views import AUGMENTATIONS
from tests.side_files import copy_side_files, write_side_files

HEADER = struct.Struct("<HHIQQ")  # version, fields, page size, samples, allocation table
FIELD, ROW, ENTRY = 1041, struct.Struct("<BHHQ3xq"), struct.Struct("<QQQ")
ROWS = HEADER.size + 2 * FIELD
WORDS = [0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(size: int, data: np.ndarray | bytes | None = None) -> np.ndarray:
    """Return uint8 [size] with the content `data`; the page after its end can be neither read nor written."""
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE), np.uint8)
    assert _LIBC.mprotect(memory.ctypes.data + pages, mmap.PAGESIZE, 0) == 0
    content = memory[pages - size : pages]
    if data is not None:
        content[:] = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    return content


class Forger:
    """Forged variants of one beton."""

    def __init__(self, beton: Path) -> None:
        self._original = beton.read_bytes()
        *_, self._count, self._table = HEADER.unpack_from(self._original)
        self._beton = beton

    def write(self, number: int, to: Path) -> None:
        """Write variant `number` to `to`: without a manifest, with the original one, or with one forged to match."""
        draw = random.Random(number)
        data = bytearray(self._original)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            draw.choice([self._bit, self._word, self._word, self._row, self._entry, self._overlap, self._record])(
                draw, data
            )
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        elif draw.random() < 0.05:
            data += draw.randbytes(draw.choice([1, ENTRY.size, 1000]))
        to.write_bytes(data)
        for path in side_files(to):
            path.unlink()
        which = draw.randrange(4)
        if which == 0:
            copy_side_files(self._beton, to)
        elif which == 1:
            _forge_manifest(to)

    def _at(self, draw: random.Random) -> int:
        """Return an offset in the header, the fields' types, the rows or the allocation table."""
        parts = [(0, HEADER.size), (HEADER.size, 24), (HEADER.size + FIELD, 24), (ROWS, self._count * ROW.size)]
        start, size = draw.choice([*parts, (self._table, self._count * ENTRY.size)])
        return start + draw.randrange(size)

    def _bit(self, draw: random.Random, data: bytearray) -> None:
        data[self._at(draw)] ^= 1 << draw.randrange(8)

    def _word(self, draw: random.Random, data: bytearray) -> None:
        at, size = self._at(draw), draw.choice([1, 2, 4, 8])
        value = draw.choice([*WORDS, len(data), self._table, draw.getrandbits(64)])
        word = struct.pack("<Q", value)[:size]
        data[at : at + size] = word

    def _row(self, draw: random.Random, data: bytearray) -> None:
        at = ROWS + draw.randrange(self._count) * ROW.size
        mode, width, height, pointer, label = ROW.unpack_from(data, at)
        sides = [0, 1, 2, 500, 11585, 65500, 65535, width, height]
        values = (
            draw.choice([mode, 0, 1, 2, 255]),
            draw.choice(sides),
            draw.choice(sides),
            pointer,
            draw.choice([label, -1]),
        )
        ROW.pack_into(data, at, *values)

    def _entry(self, draw: random.Random, data: bytearray) -> None:
        at = self._table + draw.randrange(self._count) * ENTRY.size
        sample, pointer, size = ENTRY.unpack_from(data, at)
        near = size + draw.choice([-1, 1, -size // 2, size, len(data)])
        ENTRY.pack_into(data, at, sample, pointer, draw.choice([max(near, 0), 0, 1, 2**63, 2**64 - 1, len(data)]))

    def _overlap(self, draw: random.Random, data: bytearray) -> None:
        """Move the start of a record into another record, the header, the table, or beyond the end."""
        index, other = draw.randrange(self._count), draw.randrange(self._count)
        start = ROW.unpack_from(data, ROWS + other * ROW.size)[3]
        starts = [start, start + 1, start + 100, 0, 8, ROWS, ROWS + 5, self._table - 1, self._table, len(data)]
        pointer = draw.choice([*starts, 2**63, 2**64 - 1])
        mode, width, height, _, label = ROW.unpack_from(data, ROWS + index * ROW.size)
        ROW.pack_into(data, ROWS + index * ROW.size, mode, width, height, pointer, label)
        at = self._table + index * ENTRY.size
        ENTRY.pack_into(data, at, index, pointer, ENTRY.unpack_from(data, at)[2])

    def _record(self, draw: random.Random, data: bytearray) -> None:
        """Damage the bytes of an image."""
        _, _, size = ENTRY.unpack_from(data, self._table + draw.randrange(self._count) * ENTRY.size)
        start = ROW.unpack_from(data, ROWS + draw.randrange(self._count) * ROW.size)[3]
        if start + size <= self._table:
            data[start : start + size] = damaged_jpeg(draw, bytes(data[start : start + size]))[:size].ljust(size, b"\0")


def _forge_manifest(beton: Path) -> None:
    """Write a manifest that matches the beton, with its CRCs."""
    with contextlib.suppress(InputError):
        copy = Beton(beton)
        crcs = [zlib.crc32(copy.record(index)) for index in range(len(copy))]
        names = [f"{index}.jpg" for index in range(len(copy))]
        write_side_files(beton, [], copy.header_crc32, names, crcs)


def use(beton: Path, number: int = 0) -> None:
    """Open a beton, describe and verify it, and read all its records through the loader. Raises InputError.

    number: decides on the backend, and whether unreadable records are skipped.
    """
    backend, skips = ("ffcv", "ffcv", "ffcv_gpu", "resident")[number % 4], number % 3 == 0
    copy = Beton(beton, tolerate=skips)
    starts, sizes = copy.pointers.astype(object), copy.sizes.astype(object)
    assert all(start < start + size <= copy.file_size for start, size in zip(starts, sizes, strict=True))
    assert all(start >= ROWS for index, start in enumerate(starts) if index not in copy.unreadable)
    assert describe(copy).isascii()
    copy.data = fenced(copy.file_size, copy.data)
    verify(copy, quiet=True)
    options: dict[str, Any] = {"stall_timeout": 600, "backend": backend, "on_bad": "skip" if skips else "error"}
    loader = Loader(copy, AUGMENTATIONS["moco_v2"], size=16, batch=len(copy), workers=1, prefetch_factor=1, **options)
    try:
        for batch in loader:
            assert batch.ids.tolist() != []
    finally:
        loader.close()


def damaged_jpeg(draw: random.Random, data: bytes) -> bytes:
    """Return the JPEG with bytes of its headers or entropy-coded data changed, moved, repeated or deleted."""
    changed = bytearray(data)
    headers = max(data.find(b"\xff\xda"), 4)
    for _ in range(draw.choice([1, 1, 2, 4, 8])):
        if len(changed) < 8:
            break
        end = min(headers, len(changed)) if draw.random() < 0.6 else len(changed)
        at, size = draw.randrange(2, max(end, 3)), draw.choice([1, 1, 2, 4, 16])
        kind = draw.randrange(7)
        if kind < 3:
            changed[at] = draw.choice([0, 1, 0x10, 0x11, 0x22, 0x41, 0x7F, 0xFF, draw.randrange(256)])
        elif kind == 3:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 4:
            changed[at : at + size] = draw.randbytes(size)
        elif kind == 5:
            del changed[at : at + size]
        else:
            changed[at:at] = changed[at : at + draw.choice([2, 20, 200])]
    if draw.random() < 0.1:
        del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed)


def decode_all_ways(data: bytes, draw: random.Random) -> None:
    """Decode a JPEG by jpeg.c in part and in full, by FFCV's function, and by Pillow. Raises InputError."""
    source = fenced(len(data), data)
    height, width = (int(side) for side in jpeg_frame(source)[:2])
    if 0 < height * width <= 1 << 22:
        top, left = draw.randrange(height), draw.randrange(width) // 16 * 16
        decode_part(source, (height, width), (0, 0, height, width))
        decode_part(source, (height, width), (top, left, draw.randint(1, height - top), width - left))
        decode_jpeg(source, fenced(3 * height * width), height, width)
    try:
        encode(data, 0, Settings(max_side=64))
    except Unreadable as reason:
        raise InputError(str(reason)) from None


def decode_part(source: np.ndarray, sides: tuple[int, int], box: tuple[int, int, int, int]) -> int:
    """Decode a rectangle between fences; return the status."""
    out = fenced(3 * box[2] * box[3])
    return (
        int(decode_rectangle(source.ctypes.data, source.size, *sides, *box, out.ctypes.data)) if decode_rectangle else 0
    )
