"""The manifest of a beton, `NAME.beton.json`, and its columns, `NAME.beton.columns`; neither is trusted.

The manifest is small, whatever the number of records: facts of each record are in the columns. In manifests of the
former format, 1, they were lists of the manifest itself; these are still read.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.columns import COLUMNS, Columns
from pipeline.system.errors import InputError
from pipeline.system.limits import read_json

FORMAT, _FORMER_FORMAT = 2, 1
PREPARE_AGAIN = "write it again with python -m pipeline.prepare"
_REMEDY = f"{PREPARE_AGAIN}, or delete it to read without CRCs"
_BYTES, _SAMPLE_BYTES = 1 << 24, 2048  # limit of a manifest's size: a constant, and more a sample


@dataclass
class Manifest:
    """The description of a beton by `pipeline.prepare`."""

    count: int
    classes: list[str]
    """Class names by label; empty for unlabeled images."""
    header_crc32: int
    """CRC32 of the header, the metadata and the allocation table."""
    file_size: int
    """Bytes."""
    settings: dict[str, Any]
    versions: dict[str, str]
    columns: dict[str, int] = field(default_factory=dict)
    """`size` of the file of columns, bytes, and the CRC32 of each column by its name; empty in the former format."""
    skipped: list[list[str]] = field(default_factory=list)
    """Name and reason of each skipped image."""
    mean: list[float] = field(default_factory=list)
    """Means of red, green and blue over a sample of the images, for values of 0 to 1; empty if not measured."""
    std: list[float] = field(default_factory=list)
    """The same of their standard deviations."""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the manifest to `path` as JSON. Raises OSError."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), "utf-8", "surrogateescape")

    def fault(self) -> str | None:
        """Return the first fault of fields that were read, or None."""
        if self.format not in (FORMAT, _FORMER_FORMAT) or type(self.format) is not int:
            return f"manifest format {self.format!r}, this version reads {_FORMER_FORMAT} and {FORMAT}"
        integers = [self.count, self.header_crc32, self.file_size]
        if not all(type(value) is int for value in integers):
            return "count, header_crc32 and file_size must be integers"
        if self.format == FORMAT and not (
            isinstance(self.columns, dict)
            and set(self.columns) == {"size", *COLUMNS}
            and all(type(value) is int for value in self.columns.values())
        ):
            return f"columns must give integers for size, {', '.join(COLUMNS)}"
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


def columns_path(manifest: Path | str) -> Path:
    """Return the path of the columns of a manifest: `.columns` in place of `.json`."""
    return Path(f"{str(manifest).removesuffix('.json')}.columns")


def find_manifest(beton: Path) -> Path:
    """Return the path of an existing beton's manifest: next to it, or next to the file that it links to."""
    path = manifest_path(beton)
    return path if path.exists() or not beton.is_symlink() else manifest_path(beton.resolve())


def side_files(beton: Path) -> list[Path]:
    """Return the existing files that belong to a beton: its columns and its manifest, in the order to write them."""
    manifest = find_manifest(beton)
    return [path for path in (columns_path(manifest), manifest) if manifest.exists() and path.exists()]


def read_manifest(path: Path, samples: int, file_size: int) -> tuple[Manifest, Columns]:
    """Return the manifest at `path`, of a beton of so many samples and bytes, and its columns.

    Columns are mapped, except in the former format. Raises InputError for anything else.
    """
    fields = read_json(path, _BYTES + _SAMPLE_BYTES * samples, _REMEDY, "surrogateescape")
    former: dict[str, Any] = {}
    if isinstance(fields, dict) and fields.get("format") == _FORMER_FORMAT:
        former = {name: fields.pop(name) for name in ("names", "crc32") if name in fields}
        fields.pop("columns", None)
    try:
        manifest = Manifest(**fields)
    except TypeError as error:
        raise InputError(f"{path}: not a manifest ({error}): {_REMEDY}") from None
    fault = manifest.fault()
    if fault is None and manifest.format == _FORMER_FORMAT:
        fault = _former_fault(manifest.count, former)
    if fault:
        raise InputError(f"{path}: {fault}: {_REMEDY}")
    if (manifest.count, manifest.file_size) != (samples, file_size):
        beton = str(path).removesuffix(".json")
        raise InputError(
            f"{beton}: has {samples} samples in {file_size} bytes, its manifest {path.name} says "
            f"{manifest.count} in {manifest.file_size}: {PREPARE_AGAIN}"
        )
    if manifest.format == _FORMER_FORMAT:
        return manifest, Columns.from_lists(former["names"], former["crc32"])
    return manifest, _open_columns(columns_path(path), manifest)


def _open_columns(path: Path, manifest: Manifest) -> Columns:
    """Return the columns of a manifest. Raises InputError, also for those of another manifest."""
    if not path.exists():
        raise InputError(f"{path}: no such file, which belongs to the manifest: copy it too, or {PREPARE_AGAIN}")
    try:
        columns = Columns.open(path, manifest.count, manifest.columns["size"])
        # Names are not read here: `pipeline.inspect --verify` checks them.
        fault = "" if zlib.crc32(columns.crc32.data) == manifest.columns["crc32"] else "is not of its manifest (CRC32)"
    except ValueError as error:
        fault = str(error)
    except OSError as error:
        fault = f"cannot be read ({error.strerror or error})"
    if fault:
        raise InputError(f"{path}: {fault}: copy both again, or {PREPARE_AGAIN}")
    return columns


def _former_fault(count: int, lists: dict[str, Any]) -> str | None:
    """Return the first fault of the lists of a manifest of the former format, or None."""
    for name, kind in (("crc32", int), ("names", str)):
        values = lists.get(name)
        if not isinstance(values, list) or len(values) != count or not all(type(v) is kind for v in values):
            return f"{name} must list {count} values of type {kind.__name__}"
    if not all(0 <= value < 2**32 for value in lists["crc32"]):
        return "crc32 has a value outside 32 bits"
    return None
