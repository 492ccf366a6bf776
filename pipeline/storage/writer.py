"""Writer of FFCV's file format, version 2; `pipeline.beton` reads it."""

import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.beton_format import FIELD_DESCRIPTOR, HEADER, IMAGE, INT, TABLE_ENTRY, VERSION, row_type
from pipeline.storage.encode import Record, Unreadable
from pipeline.storage.journal import ENTRY, Block, Journal

PAGE_BYTES = 1 << 23  # FFCV's default; no record crosses the boundary of a page that could contain it
_MAX_PAGE_BYTES = 1 << 31
BLOCK_IMAGES = 4096
"""Images after which records are synced and entered in the journal: the most that are encoded again after a crash."""


class BetonWriter:
    """Writes records, in order, to a beton file that FFCV's loader can read too. Memory does not grow with them.

    capacity: largest number of samples; space for their metadata precedes the records.
    journal: of records that are synced; without one, a temporary file. resume: go on after the records in the journal,
    with their file at `path`; else the file must not exist.

    Raises ValueError where that file lacks records of the journal, and OSError.
    """

    def __init__(self, path: Path, capacity: int, journal: Journal | None = None, *, resume: bool = False) -> None:
        fields = {"image": IMAGE, "label": INT}
        self._row = row_type(fields.values())
        self._descriptors = np.zeros(len(fields), FIELD_DESCRIPTOR)
        for descriptor, (name, type_id) in zip(self._descriptors, fields.items(), strict=True):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        self.images = 0
        """Images of the source that were appended or skipped."""
        self.count = 0
        """Records."""
        self.skipped: list[list[str]] = []
        """Name and reason of each skipped image."""
        self._page = PAGE_BYTES
        self._end = HEADER.itemsize + self._descriptors.nbytes + capacity * self._row.itemsize
        self.synced_images = 0
        """Images that are in the journal."""
        self._synced_skips = 0
        self._entries: list[tuple[int, ...]] = []  # since the last block
        # Never through a planted link.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if resume else os.O_CREAT | os.O_EXCL)
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b")
        self.journal = journal or Journal(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
        if resume:
            self._recover()

    def append(self, record: Record, label: int) -> None:
        """Write the next sample. Raises Unreadable for a record larger than FFCV's largest page, and OSError."""
        size = len(record.data)
        page = _page_of(size)
        if page > _MAX_PAGE_BYTES:
            raise Unreadable(f"{size} bytes, the format allows {_MAX_PAGE_BYTES}: use --max-side or --mode jpg")
        if self._end // page != (self._end + size - 1) // page:  # start on the next page
            self._end = -(-self._end // page) * page
        self._page = max(self._page, page)
        self._file.seek(self._end)
        self._file.write(record.data)
        place = self.images, self._end, size, label
        self._entries.append((*place, record.crc32, record.width, record.height, record.mode))
        self._end += size
        self.count += 1
        self._done()

    def skip(self, name: str, reason: str) -> None:
        """Leave out the next image of the source. Raises OSError."""
        self.skipped.append([name, reason])
        self._done()

    def _done(self) -> None:
        self.images += 1
        if self.images - self.synced_images == BLOCK_IMAGES:
            self.sync()

    def sync(self) -> None:
        """Write all records to disk, then enter them in the journal. Raises OSError."""
        if self.images == self.synced_images:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        entries = np.array(self._entries, ENTRY)
        self.journal.append(Block(self.images - self.synced_images, entries, self.skipped[self._synced_skips :]))
        self._entries, self.synced_images, self._synced_skips = [], self.images, len(self.skipped)

    def _recover(self) -> None:
        """Go on after the last block of the journal."""
        for block in self.journal.recover():
            self.images += block.images
            self.count += len(block.entries)
            self.skipped += block.skipped
            if len(block.entries):
                self._end = int(block.entries["pointer"][-1] + block.entries["size"][-1])
                self._page = max(self._page, _page_of(int(block.entries["size"].max())))
        self.synced_images, self._synced_skips = self.images, len(self.skipped)
        if self.count and os.fstat(self._file.fileno()).st_size < self._end:
            raise ValueError("the file ends before its last record")
        if self.count:
            self._file.truncate(self._end)  # drops records and tables that the journal does not know
        else:
            self._file.truncate(0)

    def close(self) -> int:
        """Write header, metadata and allocation table to disk; return the CRC32 of the three. Raises OSError."""
        self.sync()
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"] = VERSION, len(self._descriptors)
        header["page_size"], header["num_samples"] = self._page, self.count
        header["alloc_table_ptr"] = self._end
        crc = 0
        for place, parts in ((0, self._front(header)), (self._end, self._table())):
            self._file.seek(place)
            for part in parts:
                self._file.write(part)
                crc = zlib.crc32(part, crc)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return crc

    def _front(self, header: np.ndarray) -> Iterator[bytes]:
        yield header.tobytes() + self._descriptors.tobytes()
        for entries in self.entries():
            rows = np.zeros(len(entries), self._row)
            for name, source in (("mode", "mode"), ("width", "width"), ("height", "height"), ("data_ptr", "pointer")):
                rows["f0"][name] = entries[source]
            rows["f1"] = entries["label"]
            yield rows.tobytes()

    def _table(self) -> Iterator[bytes]:
        start = 0
        for entries in self.entries():
            table = np.zeros(len(entries), TABLE_ENTRY)
            table["sample_id"] = np.arange(start, start + len(entries))
            table["ptr"], table["size"] = entries["pointer"], entries["size"]
            start += len(entries)
            yield table.tobytes()

    def entries(self) -> Iterator[np.ndarray]:
        """Yield the journal's entries of the records, ENTRY [n], a block at a time."""
        for block in self.journal.blocks():
            yield block.entries

    def abort(self) -> None:
        """Close the incomplete file."""
        self._file.close()


def _page_of(size: int) -> int:
    """Return the size of the page for a record of `size` bytes."""
    page = PAGE_BYTES
    while page < size:
        page *= 2
    return page
