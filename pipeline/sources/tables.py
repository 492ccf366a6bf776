"""Images in the rows of tables: Hugging Face's parquet shards, and data sets saved by `datasets.save_to_disk`.

Needs pyarrow. Each image is the file's bytes as they were saved.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.sources.archives import Item, Source
from pipeline.sources.listing import ListingWriter, Numbers
from pipeline.system.errors import InputError, describe_error
from pipeline.system.limits import LIST_BYTES, MAX_FILE_BYTES, read_json
from pipeline.system.packages import installed

_INSTALL = "pip install pyarrow"
_STATE = "state.json"  # of a saved data set: its files, in order


@dataclass(frozen=True)
class Row(Item):
    """An image in a row of a table; `offset` is the row, within its group."""

    column: str = ""
    group: int = 0
    """Row group of a parquet file."""

    def read(self) -> bytes:
        """Return the image file's bytes. Raises OSError, also for more than `MAX_FILE_BYTES`."""
        value = _column(self.path, self.column, self.group)[self.offset].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError("its row has no bytes: save the data set with its images embedded")
        if len(data) > MAX_FILE_BYTES:
            raise OSError(f"{len(data)} bytes, more than {MAX_FILE_BYTES}")
        return data


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder was written by `datasets.save_to_disk`."""
    return os.path.isfile(folder / _STATE) and os.path.isfile(folder / "dataset_info.json")


def saved_tables(folder: Path) -> list[str]:
    """Return the files of a data set that `datasets.save_to_disk` wrote. Raises InputError."""
    try:
        state = read_json(folder / _STATE, LIST_BYTES, "save the data set again")
        names = [entry["filename"] for entry in state["_data_files"]]
        if not all(Path(name).name == name for name in names):
            raise ValueError("names outside of the folder")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / _STATE}: not of a saved data set ({describe_error(error)}): save it again"
        ) from None
    return [str(folder / name) for name in names]


def list_tables(
    source: str, paths: Sequence[str], image: str = "", label: str = "", folder: Path | None = None
) -> Source:
    """Return the images of tables, in their order.

    image, label: names of the columns; by default the only one of images, and `label` or the only one of class labels.
    Class names are those of the table's features, else the sorted values of a column of text. folder: for
    temporary files. Raises InputError.
    """
    if not installed("pyarrow"):
        raise InputError(f"{source}: reading tables needs pyarrow: {_INSTALL}")
    schema = _schema(paths[0])
    image = _image_column(source, schema, image)
    label, classes = _label_column(source, schema, label)
    writer, values = ListingWriter(folder), Numbers()
    for path in paths:
        if missing := {image, *([label] if label else [])} - set(_schema(path).names):
            raise InputError(f"{path}: has no column {min(missing)}, unlike {paths[0]}: give files of one data set")
        rows = _groups(path, label)
        for group, count, labels in rows:
            start = len(writer)
            for row, value in zip(range(count), labels, strict=True):
                name = f"{Path(path).name}/{start + row:08d}"
                writer.append(Row(name, path, offset=row, column=image, group=group), values.of(value))
    if not len(writer):
        raise InputError(f"{source}: no image in it: give tables with rows")
    labels, classes = _numbered(source, label, values.values, classes)
    return Source(writer.finish(labels), classes)


def _schema(path: str) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_schema(path) if path.endswith(".parquet") else _arrow_table(path).schema
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not an intact table ({describe_error(error)}): fetch it again") from None


@functools.lru_cache(maxsize=8)
def _arrow_table(path: str) -> Any:
    """Return the table in a file of Arrow's stream format, mapped into memory."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(path)).read_all()


@functools.lru_cache(maxsize=2)
def _column(path: str, column: str, group: int) -> Any:
    """Return a column of a row group, on the calling thread: forked workers have no others."""
    from pyarrow import parquet

    if not path.endswith(".parquet"):
        return _arrow_table(path).column(column)
    return parquet.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False).column(0)


def _groups(path: str, label: str) -> Iterator[tuple[int, int, list[Any]]]:
    """Yield number, rows and labels of each row group; without a label column -1 for each row."""
    from pyarrow import parquet

    if not path.endswith(".parquet"):
        table = _arrow_table(path)
        yield 0, table.num_rows, table.column(label).to_pylist() if label else [-1] * table.num_rows
        return
    file = parquet.ParquetFile(path)
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        read = file.read_row_group(group, columns=[label], use_threads=False).column(0).to_pylist() if label else []
        yield group, count, read or [-1] * count


def _image_column(source: str, schema: Any, name: str) -> str:
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    columns = [field.name for field in schema if holds_images(field.type)]
    if name and name not in columns:
        listed = ", ".join(columns) or "no column"
        raise InputError(f"--image-column {name}: {source} has images in {listed}: choose one")
    if not name and len(columns) != 1:
        remedy = "choose one with --image-column" if columns else "give a data set of images"
        raise InputError(f"{source}: has images in {len(columns)} columns ({', '.join(columns)}): {remedy}")
    return name or columns[0]


def _label_column(source: str, schema: Any, name: str) -> tuple[str, list[str]]:
    """Return name and class names of the label column; empty where there is none."""
    features = _features(schema)
    classed = [key for key, feature in features.items() if feature.get("_type") == "ClassLabel" and key in schema.names]
    if name and name not in schema.names:
        raise InputError(f"--label-column {name}: {source} has the columns {', '.join(schema.names)}: choose one")
    if not name:
        columns = ["label"] if "label" in schema.names else classed
        if len(columns) > 1:
            raise InputError(f"{source}: has class labels in {', '.join(columns)}: choose one with --label-column")
        name = columns[0] if columns else ""
    names = features.get(name, {}).get("names", [])
    return name, [str(each) for each in names] if isinstance(names, list) else []


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the features that `datasets` writes into a table's schema, by column; empty for other tables."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {str(key): value for key, value in features.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _numbered(source: str, column: str, values: list[Any], classes: list[str]) -> tuple[list[int], list[str]]:
    """Return label numbers, -1 for none, and the class names."""
    if any(isinstance(value, str) for value in values):
        classes = sorted({str(value) for value in values if value is not None})
        number = {name: label for label, name in enumerate(classes)}
        return [-1 if value is None else number[str(value)] for value in values], classes
    labels = [-1 if value is None else value for value in values]
    largest = len(classes) or 1 + max(labels, default=-1)
    wrong = next((value for value in labels if type(value) is not int or not -1 <= value < largest), None)
    if wrong is not None:
        raise InputError(f"{source}: column {column} has {wrong!r}: choose a column of labels with --label-column")
    return labels, classes if classes else [str(number) for number in range(largest)] if largest else []
