"""Reading a beton (FFCV's file format, version 2) and its manifest, trusting neither.

Layout: header, field descriptors, metadata (one row a sample), records, allocation table. `Beton` checks every size
and pointer against the file before anything is allocated or read by it, so that a forged or truncated file is an
error and never a read out of bounds.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.native.libffcv import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    JPEG,
    RAW,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    IntField,
    RGBImageField,
    get_metadata_type,
)
from pipeline.system.errors import BadRecords, InputError
from pipeline.system.limits import LARGEST_IMAGE, MOST_CLASSES, read_json
from pipeline.system.text import printable

MANIFEST_FORMAT = 1
_MAX_FIELDS = 64
_MANIFEST_BYTES, _SAMPLE_BYTES = 1 << 24, 2048  # of a manifest: at most, and what each sample adds to that
PIXELS_A_BYTE = 512  # at most, in a JPEG: a block of 64 takes a bit or more
_PREPARE_AGAIN = "write it again with python -m pipeline.prepare"


@dataclass
class Manifest:
    """What `pipeline.prepare` says of the beton it wrote; stands beside it as `NAME.beton.json`."""

    count: int
    classes: list[str]
    """Class names by label; empty where the images are unlabeled."""
    header_crc32: int
    """CRC32 of the header, the metadata and the allocation table."""
    file_size: int
    """Bytes."""
    settings: dict[str, Any]
    versions: dict[str, str]
    crc32: list[int]
    """CRC32 of each record's bytes, by sample id."""
    names: list[str]
    """Where each record came from, by sample id."""
    skipped: list[list[str]] = field(default_factory=list)
    """Name and reason of each image that was left out."""
    format: int = MANIFEST_FORMAT

    def write(self, path: Path) -> None:
        """Write the manifest to `path` as JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), "utf-8", "surrogateescape")

    @staticmethod
    def read(path: Path, samples: int) -> Manifest:
        """Read the manifest at `path`, of a beton of so many samples. Raises InputError where it is not one."""
        remedy = f"{_PREPARE_AGAIN}, or delete it to go on without CRCs"
        said = read_json(path, _MANIFEST_BYTES + _SAMPLE_BYTES * samples, remedy, "surrogateescape")
        try:
            manifest = Manifest(**said)
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
            return "crc32 holds a value outside 32 bits"
        if not isinstance(self.classes, list) or not all(isinstance(name, str) for name in self.classes):
            return "classes must be a list of names"
        for said in (self.settings, self.versions):
            if not isinstance(said, dict) or any(isinstance(value, dict | list) for value in said.values()):
                return "settings and versions must be objects of plain values"
        pairs = self.skipped if isinstance(self.skipped, list) else [None]
        if not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
            return "skipped must list pairs of name and reason"
        return None


def manifest_path(beton: Path | str) -> Path:
    """Return where the manifest of `beton` stands: the same name with `.json` after it."""
    return Path(f"{beton}.json")


def own_manifest(beton: Path) -> Path:
    """Return where the manifest of a beton that is there stands: beside it, or beside the file that a link leads to."""
    beside = manifest_path(beton)
    return beside if beside.exists() or not beton.is_symlink() else manifest_path(beton.resolve())


def count_classes(*betons: Beton) -> int:
    """Return the number of classes, from 0 to the largest label. Raises InputError for one beyond belief."""
    largest = max(betons, key=lambda beton: beton.labels.max())
    if (label := int(largest.labels.max())) >= MOST_CLASSES:
        raise InputError(f"{largest.path}: holds label {label}: give less than {MOST_CLASSES}")
    return label + 1


class Beton:
    """A beton opened for reading.

    heights, widths: int32 [n]; modes: uint8 [n] (JPEG 0, RAW 1); pointers, sizes: uint64 [n], bytes;
    labels: int64 [n], -1 where there are none; crc32: uint32 [n] or None without a manifest; data: uint8, the file.

    tolerate: records whose place or size cannot be right, or that are no JPEG's size, are not refused but listed in
    `unreadable`; they are never read, and pass for images of one pixel.

    Raises InputError where the file is missing, truncated, forged or does not fit its manifest.
    """

    def __init__(self, path: Path | str, *, tolerate: bool = False) -> None:
        self.path, self._tolerate = Path(path), tolerate
        self.unreadable: frozenset[int] = frozenset()
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
        self.crc32 = np.array(self.manifest.crc32, dtype=np.uint32) if self.manifest else None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def in_one_file(self) -> bool:
        """Whether all records stand in `data`, as a beton's do."""
        return True

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty where unknown."""
        return self.manifest.classes if self.manifest else []

    @property
    def longest_side(self) -> int:
        """The longest side of any image, pixels."""
        return int(max(self.heights.max(), self.widths.max()))

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size], a view of the memory map."""
        start = int(self.pointers[index])
        return self.data[start : start + int(self.sizes[index])]

    def name(self, index: int) -> str:
        """Return where sample `index` came from, or its number."""
        return printable(self.manifest.names[index]) if self.manifest else f"number {index}"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of header, tables and, where there is a manifest, the records' CRCs: tells two betons apart."""
        records = "" if self.crc32 is None else f"-{zlib.crc32(self.crc32.tobytes()):08x}"
        return f"{self._header_crc32():08x}-{self.file_size}-{len(self)}{records}"

    def _broken(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}: not a whole beton, {_PREPARE_AGAIN}")

    def _read(self, kind: np.dtype, count: int, offset: int, what: str) -> np.ndarray:
        if offset + count * kind.itemsize > self.file_size:
            raise self._broken(f"ends before its {what}")
        return np.fromfile(self.path, dtype=kind, count=count, offset=offset)

    def _read_header(self) -> None:
        header = self._read(HeaderType, 1, 0, "header")[0]
        fields, count = int(header["num_fields"]), int(header["num_samples"])
        if header["version"] != CURRENT_VERSION or not 0 < fields <= _MAX_FIELDS:
            raise self._broken(f"its header is not that of FFCV's format version {CURRENT_VERSION}")
        if count == 0:
            raise self._broken("it holds no sample")
        descriptors = self._read(FieldDescType, fields, HeaderType.itemsize, "field descriptors")
        if not set(descriptors["type_id"].tolist()) <= set(TYPE_ID_HANDLER) - {255}:
            raise self._broken("it has a field of an unknown type")
        try:
            handlers = [TYPE_ID_HANDLER[int(d["type_id"])].from_binary(d["arguments"]) for d in descriptors]
        except Exception:  # FFCV's parsing of a field's arguments, which trusts them
            raise self._broken("it has a field whose description cannot be read") from None
        row = get_metadata_type(handlers)
        self._images = self._first(handlers, RGBImageField)
        self._labels = self._first(handlers, IntField)
        if self._images is None:
            raise self._broken("it has no image field")
        start = HeaderType.itemsize + descriptors.nbytes
        self.metadata = self._read(row, count, start, "metadata")
        self.header_end = start + self.metadata.nbytes
        table = int(header["alloc_table_ptr"])
        if not self.header_end <= table <= self.file_size or (self.file_size - table) % ALLOC_TABLE_TYPE.itemsize:
            raise self._broken("its allocation table is not where the header says")
        self._table = self._read(
            ALLOC_TABLE_TYPE, (self.file_size - table) // ALLOC_TABLE_TYPE.itemsize, table, "table"
        )
        self._table_start = table

    @staticmethod
    def _first(handlers: list[Any], kind: type) -> str | None:
        return next((f"f{i}" for i, handler in enumerate(handlers) if type(handler) is kind), None)

    def _read_records(self) -> None:
        images = self.metadata[self._images]
        self.heights, self.widths = images["height"].astype(np.int32), images["width"].astype(np.int32)
        self.modes, self.pointers = images["mode"].copy(), images["data_ptr"].copy()
        count = len(self.metadata)
        self.labels = self.metadata[self._labels].astype(np.int64) if self._labels else np.full(count, -1)
        order = np.argsort(self._table["ptr"], kind="stable")
        starts = self._table["ptr"][order]
        found = np.searchsorted(starts, self.pointers)
        listed = found < len(starts)
        listed[listed] = starts[found[listed]] == self.pointers[listed]
        self.sizes = np.zeros(count, np.uint64)
        self.sizes[listed] = self._table["size"][order][found[listed]]
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
            "a JPEG too short for its image": (self.modes == JPEG) & (pixels // np.uint64(PIXELS_A_BYTE) > size),
            "an unknown storage mode": (self.modes != JPEG) & (self.modes != RAW),
            "a raw record whose size is not that of its image": (self.modes == RAW) & (size != pixels * np.uint64(3)),
            f"an image of more than {LARGEST_IMAGE} pixels": pixels > LARGEST_IMAGE,
        }
        found = [(int(index), what) for what, wrong in faults.items() for index in np.flatnonzero(wrong)]
        if found and self._tolerate and len(dict(found)) < len(self):
            self.unreadable = frozenset(index for index, _ in found)
            bad = sorted(self.unreadable)
            self.heights[bad] = self.widths[bad] = self.sizes[bad] = 1
            self.pointers[bad] = 0
        elif found:
            first = dict(reversed(found))
            index = min(first)
            raise BadRecords(
                f"{self.path}: sample {index} has {first[index]} ({len(first)} such samples): not a whole beton, "
                f"{_PREPARE_AGAIN}, or pass over them with --data.on_bad skip (in Python: Beton(path, tolerate=True))",
                sorted(first.items()),
            )

    def _read_manifest(self) -> Manifest | None:
        path = own_manifest(self.path)
        if not path.exists():
            return None
        manifest = Manifest.read(path, len(self))
        if (manifest.count, manifest.file_size) != (len(self), self.file_size):
            raise InputError(
                f"{self.path}: holds {len(self)} samples in {self.file_size} bytes, its manifest {path.name} says "
                f"{manifest.count} in {manifest.file_size}: {_PREPARE_AGAIN}"
            )
        if manifest.header_crc32 != self._header_crc32():
            raise InputError(
                f"{self.path}: its header or metadata are not those its manifest was made for: {_PREPARE_AGAIN}"
            )
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
