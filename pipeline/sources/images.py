"""Images of any source, or of several together."""

import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from pipeline.sources.archives import Source, open_source, tar_files
from pipeline.sources.listing import ListingWriter
from pipeline.sources.path_lists import list_paths
from pipeline.sources.patterns import is_pattern, matching_paths
from pipeline.sources.shards import list_shards
from pipeline.sources.tables import is_saved_dataset, list_tables, saved_tables
from pipeline.system.errors import InputError

_PEEKED = 1000  # files of a tar, to see whether it is a shard


def list_images(
    sources: Sequence[str],
    subset: str | None = None,
    *,
    image_column: str = "",
    label_column: str = "",
    folder: Path | None = None,
) -> Source:
    """Return the images of sources, one after another, with their classes joined by name, or without labels.

    A source: any of `open_source`; a parquet file; a folder of `datasets.save_to_disk`; a WebDataset shard; a CSV file
    of paths; or a pattern of parquet files, shards, tars, zips or folders. subset: as for `open_source`. image_column,
    label_column: of tables and CSV files; the latter also a key of a shard's JSON. folder: for the temporary files that
    list the images. Raises InputError.
    """
    parts = [_list(source, subset, image_column, label_column, folder) for source in sources]
    if len(parts) == 1:
        return parts[0]
    classes = sorted({name for part in parts for name in part.classes})
    if all(part.classes == parts[0].classes for part in parts):
        classes = parts[0].classes  # in their own order
    number = {name: label for label, name in enumerate(classes)}
    writer = ListingWriter(folder)
    for part in parts:
        for item in part.items:
            writer.append(item, number[part.classes[item.label]] if item.label >= 0 else -1)
    return Source(writer.finish(), classes)


def _list(source: str, subset: str | None, image_column: str, label_column: str, folder: Path | None) -> Source:
    paths = matching_paths(source) if is_pattern(source) else [source]
    if list_rows := _reader_of_rows(source, paths, image_column, label_column, folder):
        if subset is not None:
            raise InputError(f"--subset {subset}: {source} has no folders: leave it out")
        return list_rows()
    if image_column or label_column:
        option = "--image-column" if image_column else "--label-column"
        raise InputError(f"{option}: {source} has no columns: leave it out")
    if len(paths) > 1:
        return list_images(paths, subset, folder=folder)
    return open_source(paths[0], subset, folder)


def _reader_of_rows(
    source: str, paths: list[str], image: str, label: str, folder: Path | None
) -> Callable[[], Source] | None:
    """Return what lists the images of tables, shards or a CSV file; None for other sources."""
    if all(path.endswith(".parquet") for path in paths):
        return lambda: list_tables(source, [_existing(path) for path in paths], image, label, folder)
    if len(paths) == 1 and is_saved_dataset(Path(source)):
        return lambda: list_tables(source, saved_tables(Path(source)), image, label, folder)
    if all(path.endswith(".tar") and os.path.isfile(path) for path in paths) and _is_shard(paths[0]):
        return lambda: list_shards(source, paths, label, folder)
    if len(paths) == 1 and paths[0].endswith((".csv", ".tsv")):
        return lambda: list_paths(_existing(paths[0]), image, label)
    return None


def _existing(path: str) -> str:
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file: correct the name")
    return path


def _is_shard(path: str) -> bool:
    """Return whether a tar has files of labels."""
    return any(item.name.endswith((".cls", ".json")) for item in islice(tar_files(path), _PEEKED))
