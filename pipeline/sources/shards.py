"""WebDataset's shards: tars whose files belong together by their name up to the first dot."""

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from pipeline.sources.archives import SUFFIXES, Item, Source, tar_files
from pipeline.system.errors import InputError
from pipeline.system.limits import MAX_CLASSES

_MAX_LABEL_BYTES = 1 << 20
_JSON_KEYS = ("label", "cls", "class")


def list_shards(source: str, paths: Sequence[str], label: str = "") -> Source:
    """Return the images of shards, in their order, with the labels of `.cls` files, or of a key of `.json` files.

    label: that key; by default the first of label, cls, class that a file has. Labels are numbers or names of classes.
    Raises InputError for a sample with two images, and for labels of some samples alone.
    """
    images: list[Item] = []
    labels: list[str] = []
    for path in paths:
        for key, files in _samples(path).items():
            pictures = {kind: item for kind, item in files.items() if f".{kind.rpartition('.')[2]}".lower() in SUFFIXES}
            if len(pictures) > 1:
                raise InputError(f"{path}: {key} has {len(pictures)} images ({', '.join(pictures)}): keep one of them")
            if pictures:
                images += pictures.values()
                labels.append(_label(path, key, files, label))
    if not images:
        raise InputError(f"{source}: no image in it: give shards with {', '.join(sorted(SUFFIXES)[:4])} ... files")
    if all(labels):
        return Source(images, []).relabeled(*_numbered(source, labels))
    if any(labels):
        missing = images[labels.index("")]
        raise InputError(f"{missing.path}: {missing.name} has no label, unlike others: add it, or remove all labels")
    return Source(images, [])


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
    if "cls" in files and not name:
        return _read(path, files["cls"]).strip()
    if "json" not in files:
        return ""
    try:
        values: Any = json.loads(_read(path, files["json"]))
    except ValueError:
        raise InputError(f"{path}: {files['json'].name} is not JSON: write the shard again") from None
    found = [each for each in ((name,) if name else _JSON_KEYS) if isinstance(values, dict) and each in values]
    if not found:
        return ""
    value = values[found[0]]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"{path}: {found[0]} of {key} is {value!r}: choose another key with --label-column")
    return str(value)


def _read(path: str, item: Item) -> str:
    if item.size > _MAX_LABEL_BYTES:
        raise InputError(f"{path}: {item.name} has {item.size} bytes, more than {_MAX_LABEL_BYTES}: shorten it")
    return item.read().decode(errors="replace")


def _numbered(source: str, labels: list[str]) -> tuple[list[int], list[str]]:
    """Return label numbers and class names: numbers are labels already, other names are numbered in sorted order."""
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        if max(numbers) >= MAX_CLASSES:
            raise InputError(f"{source}: has label {max(numbers)}: give less than {MAX_CLASSES}")
        return numbers, [str(number) for number in range(max(numbers) + 1)]
    classes = sorted(set(labels))
    number = {name: label for label, name in enumerate(classes)}
    return [number[label] for label in labels], classes
