"""Manifests and columns of betons, written and copied for tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.beton import Beton
from pipeline.columns import Columns
from pipeline.manifest import Manifest, columns_path, manifest_path, side_files


def copy_side_files(beton: Path, to: Path) -> None:
    """Copy the manifest and columns of one beton as those of another."""
    for path in side_files(beton):
        shutil.copy(path, f"{to}{path.suffix}")


def write_side_files(
    beton: Path, classes: list[str], header_crc32: int, names: Sequence[str], crc32: Sequence[int]
) -> None:
    """Write manifest and columns of a beton that has these records."""
    columns = columns_path(manifest_path(beton))
    columns.unlink(missing_ok=True)
    described = Columns.from_lists(names, crc32).write(columns)
    manifest = Manifest(len(names), classes, header_crc32, beton.stat().st_size, {}, {}, described)
    manifest.write(manifest_path(beton))


def names_of(beton: Path) -> list[str]:
    """Return the names in a beton's columns."""
    columns = Beton(beton).columns
    assert columns is not None
    return [columns.name(index) for index in range(len(columns))]


def downgrade(beton: Path) -> None:
    """Rewrite manifest and columns as the one JSON of the former format, in its own order of fields."""
    opened, path = Beton(beton), manifest_path(beton)
    assert opened.crc32 is not None
    fields = json.loads(path.read_text("utf-8", "surrogateescape"))
    del fields["columns"]
    lists = {"crc32": opened.crc32.tolist(), "names": names_of(beton)}
    order = [*list(fields)[:6], *lists, *list(fields)[6:]]
    former = {name: {**fields, **lists, "format": 1}[name] for name in order}
    path.write_text(json.dumps(former, ensure_ascii=False), "utf-8", "surrogateescape")
    columns_path(path).unlink()
