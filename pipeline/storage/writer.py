"""Writer of FFCV's file format, version 2; `pipeline.beton` reads it."""

import os
import zlib
from pathlib import Path

import numpy as np

from pipeline.beton_format import FIELD_DESCRIPTOR, HEADER, IMAGE, INT, TABLE_ENTRY, VERSION, row_type
from pipeline.storage.encode import Record, Unreadable

PAGE_BYTES = 1 << 23  # FFCV's default; no record crosses the boundary of a page that could contain it
_MAX_PAGE_BYTES = 1 << 31


class BetonWriter:
    """Writes records, in order, to a beton file that FFCV's loader can read too.

    capacity: largest number of samples; space for their metadata precedes the records.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        fields = {"image": IMAGE, "label": INT}
        self._row = row_type(fields.values())
        self._descriptors = np.zeros(len(fields), FIELD_DESCRIPTOR)
        for descriptor, (name, type_id) in zip(self._descriptors, fields.items(), strict=True):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        self._metadata = np.zeros(capacity, self._row)
        self._table = np.zeros(capacity, TABLE_ENTRY)
        self._count, self._page = 0, PAGE_BYTES
        self._file = open(path, "xb")  # noqa: SIM115 - `close` closes it
        self._end = HEADER.itemsize + self._descriptors.nbytes + self._metadata.nbytes

    def append(self, record: Record, label: int) -> None:
        """Write the next sample. Raises Unreadable for a record larger than FFCV's largest page, and OSError."""
        size = len(record.data)
        page = PAGE_BYTES
        while page < size:
            page *= 2
        if page > _MAX_PAGE_BYTES:
            raise Unreadable(f"{size} bytes, the format allows {_MAX_PAGE_BYTES}: use --max-side or --mode jpg")
        if self._end // page != (self._end + size - 1) // page:  # start on the next page
            self._end = -(-self._end // page) * page
        self._page = max(self._page, page)
        self._file.seek(self._end)
        self._file.write(record.data)
        row = self._metadata[self._count]
        row["f0"] = record.mode, record.width, record.height, self._end
        row["f1"] = label
        self._table[self._count] = self._count, self._end, size
        self._count += 1
        self._end += size

    def close(self) -> int:
        """Write header, metadata and allocation table to disk; return the CRC32 of the three. Raises OSError."""
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"] = VERSION, len(self._descriptors)
        header["page_size"], header["num_samples"] = self._page, self._count
        header["alloc_table_ptr"] = self._end
        front = header.tobytes() + self._descriptors.tobytes() + self._metadata[: self._count].tobytes()
        table = self._table[: self._count].tobytes()
        self._file.seek(self._end)
        self._file.write(table)
        self._file.seek(0)
        self._file.write(front)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return zlib.crc32(table, zlib.crc32(front))

    def abort(self) -> None:
        """Close the incomplete file."""
        self._file.close()
