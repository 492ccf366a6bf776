"""Images that a CSV file lists: a column of paths, and one of labels."""

import csv
import os
from pathlib import Path, PurePosixPath

from pipeline.sources.archives import SUFFIXES, Item, Source
from pipeline.sources.labels import check_number, numbered
from pipeline.system.errors import InputError
from pipeline.system.limits import LIST_BYTES, MAX_FILES, read_text

_REMEDY = "write a header, then a line for each image"
_SHOWN = 8  # columns in messages


def list_paths(file: str, image: str = "", label: str = "") -> Source:
    """Return the images of a .csv or .tsv file, in its order; paths are relative to its folder, or absolute.

    image, label: names of the columns; by default the first one, and `label` if there is one. Labels are numbers or
    names of classes, empty for none. Raises InputError for missing columns or files.
    """
    delimiter = "\t" if file.endswith(".tsv") else ","
    lines = read_text(Path(file), LIST_BYTES, _REMEDY, "surrogateescape").removeprefix("\ufeff").splitlines()
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}: not a table of comma-separated values ({error}): {_REMEDY}") from None
    columns, rows = (rows[0], [row for row in rows[1:] if row]) if rows else ([], [])
    if not rows or len(rows) > MAX_FILES:
        raise InputError(f"{file}: lists {len(rows)} images, of at most {MAX_FILES}: {_REMEDY}")
    if any(PurePosixPath(name).suffix.lower() in SUFFIXES for name in columns):
        raise InputError(f"{file}: its first line is that of an image, not of names of columns: {_REMEDY}")
    for option, name in (("--image-column", image), ("--label-column", label)):
        if name and name not in columns:
            raise InputError(f"{option} {name}: {file} has {', '.join(columns[:_SHOWN])}: choose one of them")
    at = columns.index(image) if image else 0
    labels_at = columns.index(label or "label") if label or "label" in columns else None
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns):
            raise InputError(f"{file}, row {number}: {len(row)} values for {len(columns)} columns: {_REMEDY}")
    folder = os.path.dirname(file)
    items = [Item(row[at], os.path.join(folder, row[at])) for row in rows]
    if missing := [item for item in items if not os.path.isfile(item.path)]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        remedy = "correct the paths, relative to the file's folder, or give --image-column"
        raise InputError(f"{file}: no such file: {missing[0].path[:200]}{others}: {remedy}")
    if labels_at is None:
        return Source(items, [])
    labels = [row[labels_at].strip() for row in rows]
    for number, name in enumerate(labels, start=2):
        check_number(name, f"{file}, row {number}")
    return Source(items, []).relabeled(*numbered(labels))
