"""WebDataset's shards: tars whose files belong together by their name up to the first dot."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.sources.archives import SUFFIXES, Item, Source, tar_files
from pipeline.sources.labels import check_number, numbered
from pipeline.sources.listing import ListingWriter, Numbers
from pipeline.system.errors import InputError
from pipeline.system.limits import parse_json

_MAX_LABEL_BYTES = 1 << 20
_JSON_KEYS = ("label", "cls", "class")


def list_shards(source: str, paths: Sequence[str], label: str = "", folder: Path | None = None) -> Source:
    """Return the images of shards, sorted by name in each, with the labels of `.cls` files, or a key of `.json` files.

    label: that key; by default the first of label, cls, class that a file has. Labels are numbers or names of classes,
    -1 for samples that have none. folder: for temporary files. Raises InputError for a sample with two images.
    """
    writer, labels = ListingWriter(folder), Numbers()
    for path in paths:
        for key, files in sorted(_samples(path).items()):
            pictures = {kind: item for kind, item in files.items() if f".{kind.rpartition('.')[2]}".lower() in SUFFIXES}
            if len(pictures) > 1:
                raise InputError(f"{path}: {key} has {len(pictures)} images ({', '.join(pictures)}): keep one of them")
            for item in pictures.values():
                writer.append(item, labels.of(_label(path, key, files, label)))
    if not len(writer):
        raise InputError(f"{source}: no image in it: give shards with {', '.join(sorted(SUFFIXES)[:4])} ... files")
    numbers, classes = numbered(labels.values)
    return Source(writer.finish(numbers), classes)


def _samples(path: str) -> dict[str, dict[str, Item]]:
    """Return the files of each sample by the rest of their names, such as `jpg`, `cls`, `input.png`."""
    samples: dict[str, dict[str, Item]] = {}
    for item in tar_files(path):
        folder, name = str(PurePosixPath(item.name).parent), PurePosixPath(item.name).name
        stem, _, kind = name.partition(".")
        if stem:
            samples.setdefault(stem if folder == "." else f"{folder}/{stem}", {})[kind.lower()] = item
    return samples


def _label(path: str, key: str, files: dict[str, Item], name: str) -> str:
    """Return a sample's label as text, empty if it has none."""
    kind = "json" if name or "cls" not in files else "cls"
    if kind not in files:
        return ""
    place, text = f"{path}: {files[kind].name}", _read(path, files[kind])
    if kind == "json":
        values = parse_json(text, place, "write the shard again")
        keys = [each for each in ([name] if name else _JSON_KEYS) if isinstance(values, dict) and each in values]
        value = values[keys[0]] if keys else ""
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise InputError(f"{place}: {keys[0]} is {value!r}: choose another key with --label-column")
        text = str(value)
    check_number(text.strip(), place)
    return text.strip()


def _read(path: str, item: Item) -> str:
    if item.size > _MAX_LABEL_BYTES:
        raise InputError(f"{path}: {item.name} has {item.size} bytes, more than {_MAX_LABEL_BYTES}: shorten it")
    return item.read().decode(errors="replace")
