"""Bounded reading of files from outside: regular files of a limited size, plain JSON and YAML.

Only regular files are read (a pipe would block, a device never ends), and the size is checked first. A refusal is an
InputError that says where, what is wrong, and the caller's remedy.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from pipeline.system.errors import InputError

MAX_IMAGE_PIXELS = 1 << 27
"""Most pixels of an image: 134 million, 400 MB of RGB."""
MAX_FILE_BYTES = 1 << 28
"""Most bytes of an image file."""
MAX_FILES = 1 << 30
"""Most files in a folder or archive."""
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 1 << 31
"""Most scans of a progressive JPEG, which usually has about ten, and pixels in all of them. Also in `jpeg.c`."""
MAX_CLASSES = 1_000_000
"""Labels are below this: code that counts classes allocates memory for them."""
SETTINGS_BYTES = 1 << 16
"""Most bytes of a YAML file; recipes have 3 KiB."""
RESULT_BYTES = 1 << 24
"""Most bytes of a JSON file of a command's results."""
LIST_BYTES = 1 << 27
"""Most bytes of a file of names, one a line; ImageNet's 1.3 million take 40 MB."""
_LINE_BYTES = 1 << 20
_MAX_LEVELS = 20
_PLAIN_TYPES = ("null", "bool", "int", "float")


def open_regular(path: Path | str) -> BinaryIO:
    """Return the regular file at `path`, open for reading. Raises OSError, also for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: Path | str, most: int, remedy: str) -> bytes:
    """Return the content of a file of at most `most` bytes. Raises InputError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise InputError(f"{path}: {size} bytes, and at most {most} are read: {remedy}")
            return file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error) or error}): {remedy}") from None


def read_text(path: Path | str, most: int, remedy: str, errors: str = "strict") -> str:
    """Return the UTF-8 text of a file, without a byte order mark. Raises InputError."""
    try:
        text = read_bytes(path, most, remedy).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): {remedy}") from None
    if "\0" in text:
        raise InputError(f"{path}: not text (it contains a NUL): {remedy}")
    return text


def read_json(path: Path | str, most: int, remedy: str, errors: str = "strict") -> Any:
    """Return the content of a JSON file. Raises InputError, also for NaN, infinities and duplicate keys."""
    return parse_json(read_text(path, most, remedy, errors), path, remedy)


def parse_json(text: str, path: Path | str, remedy: str) -> Any:
    """Return the content of JSON `text`, which was read from `path`. Raises as `read_json`."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
        check_levels(value)
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}): {remedy}") from None


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a file and its JSON object, up to the first line without one, such as a truncated line.

    Raises OSError, and InputError for a line of more than a mebibyte.
    """
    with open_regular(path) as file:
        while line := file.readline(_LINE_BYTES + 1):
            if len(line) > _LINE_BYTES:
                raise InputError(f"{path}: a line of more than {_LINE_BYTES} bytes: correct or delete the file")
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(value, dict):
                return
            yield line.rstrip(b"\n") + b"\n", value


def check_levels(value: Any, levels: int = _MAX_LEVELS) -> None:
    """Raise ValueError for lists and mappings nested deeper than `levels`: recursion could not follow them."""
    if not levels:
        raise ValueError(f"more than {_MAX_LEVELS} levels")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for nested in [item for item in items if isinstance(item, (dict, list))]:
        check_levels(nested, levels - 1)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key is given twice")
    return mapping


class _Loader(yaml.SafeLoader):
    """Plain values: no tags, anchors, aliases or duplicate keys, twenty levels at most. A date is a string."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - an attribute of PyYAML's loaders
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _PLAIN_TYPES]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(None, None, "anchors are not read: write it out", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.constructor.ConstructorError(None, None, f"the tag {event.tag} is not read", event.start_mark)
        if self._level == _MAX_LEVELS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_MAX_LEVELS} levels", event.start_mark)
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return mapping


def parse_yaml(text: str) -> Any:
    """Return the content of YAML `text`, as plain values. Raises yaml.YAMLError and ValueError."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path | str, remedy: str) -> Any:
    """Return the content of a YAML file. Raises InputError."""
    text = read_text(path, SETTINGS_BYTES, remedy)
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise InputError(f"{path}: not valid YAML ({detail}): {remedy}") from None
