"""Facts of each record of a beton, in columns of a file in safetensors format: names and CRC32s, read from a map.

Layout: length of the header, uint64; header, JSON of each column's type, shape and place, padded with blanks to a
multiple of 8 bytes; columns. The header follows from the number of records and the bytes of their names, so that a
reader compares it instead of parsing it. Ranks of a machine share the pages that they read.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.system.chunks import chunks
from pipeline.system.limits import open_regular

_TYPES: dict[str, tuple[str, np.dtype]] = {
    "name_ends": ("I64", np.dtype("<i8")),
    "crc32": ("U32", np.dtype("<u4")),
    "names": ("U8", np.dtype("u1")),
}
COLUMNS = tuple(_TYPES)
"""Names of the columns, as they lie in the file."""
_LENGTH = np.dtype("<u8")
_MAX_HEADER_BYTES = 1 << 10
_MAX_NAME_BYTES = 1 << 16


@dataclass(frozen=True)
class Columns:
    """Names and CRC32s of n records."""

    name_ends: np.ndarray
    """int64 [n]: the end of each name in `names`; each starts where the one before ends."""
    crc32: np.ndarray
    """uint32 [n]: CRC32 of each record's bytes."""
    names: np.ndarray
    """uint8: source paths in UTF-8, one after another; bytes that are not UTF-8 as they are."""

    @staticmethod
    def from_lists(names: Sequence[str], crc32: Sequence[int]) -> "Columns":
        """Return the columns of records with these names and CRC32s."""
        parts = [encoded(name) for name in names]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return Columns(ends, np.array(crc32, np.uint32), np.frombuffer(b"".join(parts), np.uint8))

    @staticmethod
    def open(path: Path, count: int, size: int) -> "Columns":
        """Map the columns of `count` records in a file of `size` bytes. Raises ValueError for others, and OSError."""
        with open_regular(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            if file_bytes != size:
                raise ValueError(f"has {file_bytes} bytes, its manifest says {size}")
            head = file.read(_LENGTH.itemsize + _MAX_HEADER_BYTES)
        start = _LENGTH.itemsize + int.from_bytes(head[: _LENGTH.itemsize], "little")
        name_bytes = size - start - count * sum(_TYPES[name][1].itemsize for name in ("name_ends", "crc32"))
        if name_bytes < 0 or head[:start] != _header(count, name_bytes):
            raise ValueError(f"its header is not that of the columns of {count} records")
        places = _places(count, name_bytes)
        # Of each column a map of its own: NumPy maps no column of 0 bytes.
        mapped = (
            np.asarray(np.memmap(path, kind, "r", start + places[name][0], (length,))) if length else np.zeros(0, kind)
            for (name, (_, kind)), length in zip(_TYPES.items(), (count, count, name_bytes), strict=True)
        )
        return Columns(*mapped)

    def __len__(self) -> int:
        return len(self.crc32)

    def name(self, index: int) -> str:
        """Return the name of record `index`. Raises ValueError where the columns give no place for it."""
        start, end = int(self.name_ends[index - 1]) if index else 0, int(self.name_ends[index])
        if not 0 <= start <= end <= len(self.names) or end - start > _MAX_NAME_BYTES:
            raise ValueError(f"the name of record {index} has no place in its column")
        return self.names[start:end].tobytes().decode("utf-8", "surrogateescape")

    def faults(self, crcs: dict[str, int]) -> list[str]:
        """Return the columns whose CRC32 is not that in `crcs`; reads all of them."""
        return [name for name in COLUMNS if zlib.crc32(getattr(self, name).data) != crcs[name]]

    def write(self, path: Path) -> dict[str, int]:
        """Write the columns as `write_columns` does."""
        return write_columns(path, len(self), len(self.names), self._parts())

    def _parts(self) -> Iterator[tuple[list[bytes], np.ndarray]]:
        for rows in chunks(len(self)):
            yield [encoded(self.name(index)) for index in range(rows.start, rows.stop)], self.crc32[rows]


def write_columns(
    path: Path, count: int, name_bytes: int, parts: Iterable[tuple[Sequence[bytes], np.ndarray]]
) -> dict[str, int]:
    """Write columns of `count` records to a new file, synced; return its size and the CRC32 of each column.

    name_bytes: of all names. parts: names and CRC32s (uint32) of records, in order. Raises OSError.
    """
    header = _header(count, name_bytes)
    places = {name: len(header) + start for name, (start, _) in _places(count, name_bytes).items()}
    crcs, end = dict.fromkeys(COLUMNS, 0), 0
    with open(path, "xb") as file:
        file.write(header)
        for names, crc32 in parts:
            ends = end + np.cumsum([len(name) for name in names], dtype=np.int64)
            end = int(ends[-1]) if len(ends) else end
            written = ends.astype("<i8").tobytes(), crc32.astype("<u4").tobytes(), b"".join(names)
            for name, data in zip(COLUMNS, written, strict=True):
                file.seek(places[name])
                file.write(data)
                places[name] += len(data)
                crcs[name] = zlib.crc32(data, crcs[name])
        file.flush()
        os.fsync(file.fileno())
    if end != name_bytes:
        raise ValueError(f"names of {end} bytes, not of {name_bytes}")
    return {"size": path.stat().st_size, **crcs}


def encoded(name: str) -> bytes:
    """Return a name as it lies in its column."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair of UTF-16, of JSON
        return name.encode("utf-8", "replace")


def _places(count: int, name_bytes: int) -> dict[str, tuple[int, int]]:
    """Return start and end of each column, from the end of the header on."""
    lengths, places, start = (count, count, name_bytes), {}, 0
    for (name, (_, kind)), length in zip(_TYPES.items(), lengths, strict=True):
        places[name] = start, start + length * kind.itemsize
        start = places[name][1]
    return places


def _header(count: int, name_bytes: int) -> bytes:
    """Return the start of a file with these columns, up to the first of them."""
    lengths, places = (count, count, name_bytes), _places(count, name_bytes)
    described = {
        name: {"dtype": kind, "shape": [length], "data_offsets": places[name]}
        for (name, (kind, _)), length in zip(_TYPES.items(), lengths, strict=True)
    }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH.itemsize, "little") + text
