"""Reader of betons (FFCV's file format, version 2) and their manifests; neither is trusted.

Layout: header, field descriptors, metadata (a row for each sample), records, allocation table. `Beton` checks every
size and pointer against the file before it allocates or reads by it: a forged or truncated file is an error, never a
read out of bounds.
"""

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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
from pipeline.system.errors import BadRecords, InputError
from pipeline.system.limits import MAX_CLASSES, MAX_IMAGE_PIXELS, read_json
from pipeline.system.text import printable

MANIFEST_FORMAT = 1
_MAX_FIELDS = 64
_MANIFEST_BYTES, _MANIFEST_SAMPLE_BYTES = 1 << 24, 2048  # limit of a manifest's size: a constant, and more a sample
MAX_PIXELS_PER_BYTE = 512  # bound for a JPEG: a block of 64 pixels takes a bit or more
_PREPARE_AGAIN = "write it again with python -m pipeline.prepare"


@dataclass
class Manifest:
    """The description of a beton by `pipeline.prepare`, stored next to it as `NAME.beton.json`."""

    count: int
    classes: list[str]
    """Class names by label; empty for unlabeled images."""
    header_crc32: int
    """CRC32 of the header, the metadata and the allocation table."""
    file_size: int
    """Bytes."""
    settings: dict[str, Any]
    versions: dict[str, str]
    crc32: list[int]
    """CRC32 of each record, by sample id."""
    names: list[str]
    """Source path of each record, by sample id."""
    skipped: list[list[str]] = field(default_factory=list)
    """Name and reason of each skipped image."""
    mean: list[float] = field(default_factory=list)
    """Means of red, green and blue over a sample of the images, for values of 0 to 1; empty if not measured."""
    std: list[float] = field(default_factory=list)
    """The same of their standard deviations."""
    format: int = MANIFEST_FORMAT

    def write(self, path: Path) -> None:
        """Write the manifest to `path` as JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), "utf-8", "surrogateescape")

    @staticmethod
    def read(path: Path, samples: int) -> "Manifest":
        """Return the manifest at `path`, of a beton of so many samples. Raises InputError for anything else."""
        remedy = f"{_PREPARE_AGAIN}, or delete it to read without CRCs"
        fields = read_json(path, _MANIFEST_BYTES + _MANIFEST_SAMPLE_BYTES * samples, remedy, "surrogateescape")
        try:
            manifest = Manifest(**fields)
        except TypeError as error:
            raise InputError(f"{path}: not a manifest ({error}): {remedy}") from None
        problem = manifest._problem()
        if problem:
            raise InputError(f"{path}: {problem}: {remedy}")
        return manifest

    def _problem(self) -> str | None:
        if self.format != MANIFEST_FORMAT:
            return f"manifest format {self.format!r}, this version reads {MANIFEST_FORMAT}"
        integers = [self.count, self.header_crc32, self.file_size]
        if not all(type(value) is int for value in integers):
            return "count, header_crc32 and file_size must be integers"
        for name, kind in (("crc32", int), ("names", str)):
            values = getattr(self, name)
            if not isinstance(values, list) or len(values) != self.count or not all(type(v) is kind for v in values):
                return f"{name} must list {self.count} values of type {kind.__name__}"
        if not all(0 <= value < 2**32 for value in self.crc32):
            return "crc32 has a value outside 32 bits"
        if not isinstance(self.classes, list) or not all(isinstance(name, str) for name in self.classes):
            return "classes must be a list of names"
        for mapping in (self.settings, self.versions):
            if not isinstance(mapping, dict) or any(isinstance(value, dict | list) for value in mapping.values()):
                return "settings and versions must be objects of plain values"
        pairs = self.skipped if isinstance(self.skipped, list) else [None]
        if not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
            return "skipped must list pairs of name and reason"
        for values in (self.mean, self.std):
            if values != [] and not (isinstance(values, list) and [type(value) for value in values] == [float] * 3):
                return "mean and std must list three numbers each"
        return None


def manifest_path(beton: Path | str) -> Path:
    """Return the path of a beton's manifest: the same name with `.json` appended."""
    return Path(f"{beton}.json")


def find_manifest(beton: Path) -> Path:
    """Return the path of an existing beton's manifest: next to it, or next to the file that it links to."""
    path = manifest_path(beton)
    return path if path.exists() or not beton.is_symlink() else manifest_path(beton.resolve())


def count_classes(*betons: "Beton") -> int:
    """Return the number of classes, from 0 to the largest label. Raises InputError for a label too large."""
    largest = max(betons, key=lambda beton: beton.labels.max())
    if (label := int(largest.labels.max())) >= MAX_CLASSES:
        raise InputError(f"{largest.path}: has label {label}: give less than {MAX_CLASSES}")
    return label + 1


class Beton:
    """A beton opened for reading.

    heights, widths: int32 [n]; modes: uint8 [n] (JPEG 0, RAW 1); pointers, sizes: uint64 [n], bytes;
    labels: int64 [n], -1 for none; classes: class names by label, [] if unknown;
    crc32: uint32 [n] or None without a manifest; data: uint8, the file.

    tolerate: list records of impossible place or size in `unreadable` instead of raising BadRecords. They are never
    read, and appear as images of one pixel.

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
        try:
            self.file_size = self.path.stat().st_size
            self._read_header()
            self._read_records()
            self.manifest = self._read_manifest()
            self.data: np.ndarray = np.memmap(self.path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}): make it readable") from None
        self.classes = self.manifest.classes if self.manifest else []
        self.crc32 = np.array(self.manifest.crc32, dtype=np.uint32) if self.manifest else None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def longest_side(self) -> int:
        """The longest side of any image, pixels."""
        return int(max(self.heights.max(), self.widths.max()))

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size], a view of the memory map."""
        start = int(self.pointers[index])
        return self.data[start : start + int(self.sizes[index])]

    def name(self, index: int) -> str:
        """Return the source path of sample `index`, or its number."""
        return printable(self.manifest.names[index]) if self.manifest else f"number {index}"

    @cached_property
    def fingerprint(self) -> str:
        """A hash that identifies the beton: of header, tables and, with a manifest, the records' CRCs."""
        records = "" if self.crc32 is None else f"-{zlib.crc32(self.crc32.tobytes()):08x}"
        return f"{self._header_crc32():08x}-{self.file_size}-{len(self)}{records}"

    def _broken(self, fault: str) -> InputError:
        return InputError(f"{self.path}: {fault}: not an intact beton, {_PREPARE_AGAIN}")

    def _read(self, kind: np.dtype, count: int, offset: int, part: str) -> np.ndarray:
        if offset + count * kind.itemsize > self.file_size:
            raise self._broken(f"ends before its {part}")
        return np.fromfile(self.path, dtype=kind, count=count, offset=offset)

    def _read_header(self) -> None:
        header = self._read(HEADER, 1, 0, "header")[0]
        fields, count = int(header["num_fields"]), int(header["num_samples"])
        if header["version"] != VERSION or not 0 < fields <= _MAX_FIELDS:
            raise self._broken(f"its header is not that of FFCV's format version {VERSION}")
        if count == 0:
            raise self._broken("it has no sample")
        descriptors = self._read(FIELD_DESCRIPTOR, fields, HEADER.itemsize, "field descriptors")
        type_ids = descriptors["type_id"].tolist()
        if not set(type_ids) <= set(FIELDS):
            raise self._broken("it has a field of an unknown type")
        row = row_type(type_ids)
        first = {type_id: f"f{i}" for i, type_id in reversed(list(enumerate(type_ids)))}
        self._images, self._labels = first.get(IMAGE), first.get(INT)
        if self._images is None:
            raise self._broken("it has no image field")
        start = HEADER.itemsize + descriptors.nbytes
        self.metadata = self._read(row, count, start, "metadata")
        self.header_end = start + self.metadata.nbytes
        table = int(header["alloc_table_ptr"])
        if not self.header_end <= table <= self.file_size or (self.file_size - table) % TABLE_ENTRY.itemsize:
            raise self._broken("its allocation table is not where the header says")
        entries = (self.file_size - table) // TABLE_ENTRY.itemsize
        self._table, self._table_start = self._read(TABLE_ENTRY, entries, table, "table"), table

    def _read_records(self) -> None:
        images = self.metadata[self._images]
        self.heights, self.widths = images["height"].astype(np.int32), images["width"].astype(np.int32)
        self.modes, self.pointers = images["mode"].copy(), images["data_ptr"].copy()
        count = len(self.metadata)
        self.labels = self.metadata[self._labels].astype(np.int64) if self._labels else np.full(count, -1)
        # The sizes are those of the allocation table's entries with the same pointers.
        order = np.argsort(self._table["ptr"], kind="stable")
        starts = self._table["ptr"][order]
        entries = np.searchsorted(starts, self.pointers)
        listed = entries < len(starts)
        listed[listed] = starts[entries[listed]] == self.pointers[listed]
        self.sizes = np.zeros(count, np.uint64)
        self.sizes[listed] = self._table["size"][order][entries[listed]]
        self._check_records(listed)

    def _check_records(self, listed: np.ndarray) -> None:
        pixels = self.heights.astype(np.uint64) * self.widths.astype(np.uint64)
        end, size = np.uint64(self._table_start), self.sizes
        faults = {
            "a pointer that its allocation table does not list": ~listed,
            "a record outside the file": (self.pointers < self.header_end)
            | (size > end)
            | (self.pointers > end - size),
            "an empty record": size == 0,
            "an image of no pixels": pixels == 0,
            "a JPEG too short for its image": (self.modes == JPEG) & (pixels // np.uint64(MAX_PIXELS_PER_BYTE) > size),
            "an unknown storage mode": (self.modes != JPEG) & (self.modes != RAW),
            "a raw record whose size is not that of its image": (self.modes == RAW) & (size != pixels * np.uint64(3)),
            f"an image of more than {MAX_IMAGE_PIXELS} pixels": pixels > MAX_IMAGE_PIXELS,
        }
        # Of several faults of a sample the first one counts.
        bad = {int(index): fault for fault in reversed(faults) for index in np.flatnonzero(faults[fault])}
        if bad and self._tolerate and len(bad) < len(self):
            self.unreadable = frozenset(bad)
            ids = sorted(bad)
            self.heights[ids] = self.widths[ids] = self.sizes[ids] = 1
            self.pointers[ids] = 0
        elif bad:
            first = min(bad)
            raise BadRecords(
                f"{self.path}: sample {first} has {bad[first]} ({len(bad)} such samples): not an intact beton, "
                f"{_PREPARE_AGAIN}, or skip them with --data.on-bad skip (in Python: Beton(path, tolerate=True))",
                sorted(bad.items()),
            )

    def _read_manifest(self) -> Manifest | None:
        path = find_manifest(self.path)
        if not path.exists():
            return None
        manifest = Manifest.read(path, len(self))
        if (manifest.count, manifest.file_size) != (len(self), self.file_size):
            raise InputError(
                f"{self.path}: has {len(self)} samples in {self.file_size} bytes, its manifest {path.name} says "
                f"{manifest.count} in {manifest.file_size}: {_PREPARE_AGAIN}"
            )
        if manifest.header_crc32 != self._header_crc32():
            raise InputError(f"{self.path}: its header or metadata do not match its manifest: {_PREPARE_AGAIN}")
        if manifest.classes and self.labels.max() >= len(manifest.classes):
            raise InputError(
                f"{self.path}: has label {self.labels.max()}, and {path.name} {len(manifest.classes)} classes: "
                f"{_PREPARE_AGAIN}"
            )
        return manifest

    def _header_crc32(self) -> int:
        with open(self.path, "rb") as file:
            crc = zlib.crc32(file.read(self.header_end))
            file.seek(self._table_start, os.SEEK_SET)
            return zlib.crc32(file.read(), crc)
