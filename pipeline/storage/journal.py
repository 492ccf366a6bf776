"""Journal of an unfinished beton, in a file next to it, from which `prepare` resumes after it was killed.

Layout: a line of JSON, the facts that must agree; then blocks, each written once its records are on the disk: head,
entries of the records, JSON of the skipped images, and CRC32. A block that was cut off, or does not match it, is the
end.
"""

import contextlib
import errno
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.system.errors import InputError

ENTRY = np.dtype(
    [
        ("image", "<u8"),
        ("pointer", "<u8"),
        ("size", "<u8"),
        ("label", "<i8"),
        ("crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("mode", "<u1"),
    ]
)
"""A record: number of its image in the source, place in the beton, and row of the tables."""
_HEAD, _CRC = struct.Struct("<3I"), struct.Struct("<I")  # images, entries, bytes of JSON; CRC32 of the block
_MAX_LINE_BYTES = 1 << 24
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of a file system without them


class Block(NamedTuple):
    """Records that were written together."""

    images: int
    """Images of the source, stored and skipped."""
    entries: np.ndarray
    """ENTRY [n]."""
    skipped: list[list[str]]
    """Name and reason of each skipped image."""


class Journal:
    """A journal in an open file, of its own from now on. Methods raise OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._start = self._end = 0

    @staticmethod
    def open(path: Path) -> "Journal":
        """Open or create the journal at `path`. Raises InputError where another process writes it."""
        while True:
            # Never through a planted link.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            file = os.fdopen(descriptor, "r+b")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise InputError(f"{path}: another process writes this file: wait for it") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return Journal(file)
            file.close()  # the process that had the lock has deleted it

    def facts(self) -> dict[str, Any]:
        """Return the facts of the process that wrote it, {} for none."""
        self._file.seek(0)
        line = self._file.readline(_MAX_LINE_BYTES)
        try:
            facts = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            return {}
        self._start = len(line)
        return facts if isinstance(facts, dict) else {}

    def begin(self, facts: dict[str, Any]) -> None:
        """Drop all content, and write the facts."""
        self._file.truncate(0)
        self._file.seek(0)
        self._file.write(json.dumps(facts).encode() + b"\n")
        self._sync()
        self._start = self._end = self._file.tell()

    def append(self, block: Block) -> None:
        """Add a block, whose records are on the disk."""
        entries, text = block.entries.tobytes(), json.dumps(block.skipped).encode() if block.skipped else b""
        data = _HEAD.pack(block.images, len(block.entries), len(text)) + entries + text
        self._file.seek(self._end)
        self._file.write(data + _CRC.pack(zlib.crc32(data)))
        self._sync()
        self._end = self._file.tell()

    def recover(self) -> Iterator[Block]:
        """Yield the blocks of an earlier process, and drop what follows the last intact one. Call `facts` before."""
        self._end = os.fstat(self._file.fileno()).st_size
        intact = self._start
        for block, end in self._read():
            intact = end
            yield block
        self._file.truncate(intact)
        self._end = intact

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks, in order."""
        for block, _ in self._read():
            yield block

    def _read(self) -> Iterator[tuple[Block, int]]:
        """Yield the intact blocks, with the end of each."""
        at, stop = self._start, self._end
        while at + _HEAD.size <= stop:
            self._file.seek(at)
            head = self._file.read(_HEAD.size)
            images, count, length = _HEAD.unpack(head)
            size = count * ENTRY.itemsize + length
            at += _HEAD.size + size + _CRC.size
            if at > stop:
                return
            data = self._file.read(size)
            if self._file.read(_CRC.size) != _CRC.pack(zlib.crc32(head + data)):
                return
            entries, text = np.frombuffer(data, ENTRY, count), data[size - length :]
            yield Block(images, entries, json.loads(text) if text else []), at

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, for others to open."""
        self._file.close()
