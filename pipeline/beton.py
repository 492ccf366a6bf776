"""Reader of betons (FFCV's file format, version 2) and their manifests; neither is trusted.

Layout: header, field descriptors, metadata (a row for each sample), records, allocation table. `Beton` checks every
size and pointer against the file before it allocates or reads by it: a forged or truncated file is an error, never a
read out of bounds.
"""

import os
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.beton_format import (
    FIELD_DESCRIPTOR,
    FIELDS,
    HEADER,
    IMAGE,
    INT,
    JPEG,
    RAW,
    TABLE_ENTRY,
    VERSION,
    row_type,
)
from pipeline.columns import Columns
from pipeline.manifest import PREPARE_AGAIN, Manifest, find_manifest, read_manifest
from pipeline.system.chunks import chunks
from pipeline.system.errors import BadRecords, InputError
from pipeline.system.limits import MAX_CLASSES, MAX_IMAGE_PIXELS
from pipeline.system.text import printable

_MAX_FIELDS = 64
MAX_PIXELS_PER_BYTE = 512  # bound for a JPEG: a block of 64 pixels takes a bit or more
_BLOCK_BYTES = 1 << 20


def count_classes(*betons: "Beton") -> int:
    """Return the number of classes, from 0 to the largest label. Raises InputError for a label too large."""
    largest = max(betons, key=lambda beton: beton.labels.max())
    if (label := int(largest.labels.max())) >= MAX_CLASSES:
        raise InputError(f"{largest.path}: has label {label}: give less than {MAX_CLASSES}")
    return label + 1


class Beton:
    """A beton opened for reading.

    heights, widths: uint16 [n]: widen them before multiplying; modes: uint8 [n] (JPEG 0, RAW 1); pointers, sizes:
    uint64 [n], bytes; labels: int64 [n], -1 for none; classes: class names by label, [] if unknown;
    crc32: uint32 [n] or None without a manifest; data: uint8, the file.

    The arrays are views of the file's tables and of the manifest's columns, mapped into memory: ranks share them.

    tolerate: list records of impossible place or size in `unreadable` instead of raising BadRecords. They are never
    read, and appear as JPEGs of one pixel.

    Raises InputError for a file that is missing, truncated or forged, or that does not match its manifest.
    """

    in_one_file = True
    """Whether all records are in `data`."""
    unreadable: frozenset[int] = frozenset()

    def __init__(self, path: Path | str, *, tolerate: bool = False) -> None:
        self.path, self._tolerate = Path(path), tolerate
        if os.path.isdir(self.path):
            raise InputError(
                f"{path}: is a folder: write a beton from it with python -m pipeline.prepare {path} OUT.beton"
            )
        if not os.path.isfile(self.path):
            raise InputError(f"{path}: no such file: write it with python -m pipeline.prepare SOURCE {path}")
        self.manifest: Manifest | None = None
        self.columns: Columns | None = None
        try:
            self.file_size = self.path.stat().st_size
            self._read_header()
            self._read_records()
            self._read_manifest()
            self.data: np.ndarray = np.memmap(self.path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}): make it readable") from None
        self.classes: list[str] = self.manifest.classes if self.manifest else []
        self.crc32 = self.columns.crc32 if self.columns else None

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def longest_side(self) -> int:
        """The longest side of any image, pixels."""
        return int(max(self.heights.max(), self.widths.max()))

    @cached_property
    def most_pixels(self) -> int:
        """The number of pixels of the largest image."""
        return max(int(pixels.max()) for pixels in self.pixels())

    def pixels(self) -> Iterator[np.ndarray]:
        """Yield the number of pixels of each image in turn, in chunks: int64 [k]."""
        for rows in chunks(len(self)):
            yield self.heights[rows].astype(np.int64) * self.widths[rows]

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size], a view of the memory map."""
        start = int(self.pointers[index])
        return self.data[start : start + int(self.sizes[index])]

    def name(self, index: int) -> str:
        """Return the source path of sample `index`, or its number."""
        try:
            return printable(self.columns.name(index)) if self.columns else f"number {index}"
        except ValueError:  # damaged columns, which `pipeline.inspect --verify` reports: this is for messages
            return f"number {index}"

    def place(self, index: int) -> tuple[Path, int]:
        """Return the file that contains sample `index`, and its number there."""
        return self.path, index

    @cached_property
    def fingerprint(self) -> str:
        """A hash that identifies the beton: of header, tables and, with a manifest, the records' CRCs."""
        records = "" if self.crc32 is None else f"-{zlib.crc32(np.ascontiguousarray(self.crc32).data):08x}"
        return f"{self.header_crc32:08x}-{self.file_size}-{len(self)}{records}"

    @cached_property
    def header_crc32(self) -> int:
        """CRC32 of the file's header, metadata and allocation table."""
        crc = 0
        with open(self.path, "rb") as file:
            for start, end in ((0, self.header_end), (self._table_start, self.file_size)):
                file.seek(start)
                while start < end and (block := file.read(min(_BLOCK_BYTES, end - start))):
                    crc, start = zlib.crc32(block, crc), start + len(block)
        return crc

    def _broken(self, fault: str) -> InputError:
        return InputError(f"{self.path}: {fault}: not an intact beton, {PREPARE_AGAIN}")

    def _map(self, kind: np.dtype, count: int, offset: int, part: str) -> np.ndarray:
        """Map an array of the file. Changes stay in this process, which copies the pages it changes."""
        if offset + count * kind.itemsize > self.file_size:
            raise self._broken(f"ends before its {part}")
        return np.asarray(np.memmap(self.path, kind, "c", offset, (count,))) if count else np.zeros(0, kind)

    def _read_header(self) -> None:
        header = self._map(HEADER, 1, 0, "header")[0]
        fields, count = int(header["num_fields"]), int(header["num_samples"])
        if header["version"] != VERSION or not 0 < fields <= _MAX_FIELDS:
            raise self._broken(f"its header is not that of FFCV's format version {VERSION}")
        if count == 0:
            raise self._broken("it has no sample")
        descriptors = self._map(FIELD_DESCRIPTOR, fields, HEADER.itemsize, "field descriptors")
        type_ids = descriptors["type_id"].tolist()
        if not set(type_ids) <= set(FIELDS):
            raise self._broken("it has a field of an unknown type")
        row = row_type(type_ids)
        first = {type_id: f"f{i}" for i, type_id in reversed(list(enumerate(type_ids)))}
        self._images, self._labels = first.get(IMAGE), first.get(INT)
        if self._images is None:
            raise self._broken("it has no image field")
        start = HEADER.itemsize + descriptors.nbytes
        self.metadata = self._map(row, count, start, "metadata")
        self.header_end = start + self.metadata.nbytes
        table = int(header["alloc_table_ptr"])
        if not self.header_end <= table <= self.file_size or (self.file_size - table) % TABLE_ENTRY.itemsize:
            raise self._broken("its allocation table is not where the header says")
        entries = (self.file_size - table) // TABLE_ENTRY.itemsize
        self._table, self._table_start = self._map(TABLE_ENTRY, entries, table, "table"), table

    def _read_records(self) -> None:
        images = self.metadata[self._images]
        self.heights, self.widths = images["height"], images["width"]
        self.modes, self.pointers = images["mode"], images["data_ptr"]
        count = len(self.metadata)
        unlabeled = np.broadcast_to(np.int64(-1), count)
        self.labels = self.metadata[self._labels] if self._labels else unlabeled
        self.sizes, listed = self._find_sizes()
        bad: dict[int, str] = {}
        for rows in chunks(count):
            bad |= self._faults(rows, listed[rows])
        if bad and self._tolerate and len(bad) < count:
            self.unreadable = frozenset(bad)
            ids = sorted(bad)
            self.heights[ids] = self.widths[ids] = self.sizes[ids] = 1
            self.pointers[ids] = self.modes[ids] = 0
        elif bad:
            first = min(bad)
            raise BadRecords(
                f"{self.path}: sample {first} has {bad[first]} ({len(bad)} such samples): not an intact beton, "
                f"{PREPARE_AGAIN}, or skip them with --data.on-bad skip (in Python: Beton(path, tolerate=True))",
                sorted(bad.items()),
            )

    def _find_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sizes of the records, uint64 [n], and whether the allocation table lists them, bool [n].

        Sizes are those of the entries with the same pointers: a view of a table in the order of the samples, as
        `pipeline.prepare` writes it; else a copy.
        """
        table, count = self._table, len(self.pointers)
        if len(table) == count and all(
            np.array_equal(table["ptr"][rows], self.pointers[rows]) for rows in chunks(count)
        ):
            return table["size"], np.broadcast_to(True, count)
        order = np.argsort(table["ptr"], kind="stable")
        starts, sizes, listed = table["ptr"][order], np.zeros(count, np.uint64), np.zeros(count, bool)
        for rows in chunks(count):
            pointers = self.pointers[rows]
            entries = np.searchsorted(starts, pointers)
            present = entries < len(starts)
            present[present] = starts[entries[present]] == pointers[present]
            listed[rows] = present
            sizes[rows][present] = table["size"][order[entries[present]]]
        return sizes, listed

    def _faults(self, rows: slice, listed: np.ndarray) -> dict[int, str]:
        """Return the first fault of each bad record of a slice, by its sample."""
        heights, widths, modes = self.heights[rows], self.widths[rows], self.modes[rows]
        pointers, size, end = self.pointers[rows], self.sizes[rows], np.uint64(self._table_start)
        pixels = heights.astype(np.uint64) * widths.astype(np.uint64)
        faults = {
            "a pointer that its allocation table does not list": ~listed,
            "a record outside the file": (pointers < self.header_end) | (size > end) | (pointers > end - size),
            "an empty record": size == 0,
            "an image of no pixels": pixels == 0,
            "a JPEG too short for its image": (modes == JPEG) & (pixels // np.uint64(MAX_PIXELS_PER_BYTE) > size),
            "an unknown storage mode": (modes != JPEG) & (modes != RAW),
            "a raw record whose size is not that of its image": (modes == RAW) & (size != pixels * np.uint64(3)),
            f"an image of more than {MAX_IMAGE_PIXELS} pixels": pixels > MAX_IMAGE_PIXELS,
        }
        # Of several faults of a sample the first one counts.
        return {rows.start + int(index): fault for fault in reversed(faults) for index in np.flatnonzero(faults[fault])}

    def _read_manifest(self) -> None:
        path = find_manifest(self.path)
        if not path.exists():
            return
        self.manifest, self.columns = read_manifest(path, len(self), self.file_size)
        if self.manifest.header_crc32 != self.header_crc32:
            raise InputError(f"{self.path}: its header or metadata do not match its manifest: {PREPARE_AGAIN}")
        classes = self.manifest.classes
        if classes and self.labels.max() >= len(classes):
            raise InputError(
                f"{self.path}: has label {self.labels.max()}, and {path.name} {len(classes)} classes: {PREPARE_AGAIN}"
            )
