"""What comes from outside, read within bounds: files of a known kind and size, and plain JSON and YAML.

Only regular files are read (a pipe would block, a device never end), and their size is checked before any of it is.
What is refused is an InputError that says where, what, and the remedy the caller gives.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from pipeline.system.errors import InputError

LARGEST_IMAGE = 1 << 27
"""Pixels of an image: 134 million, 400 MB of RGB."""
LARGEST_FILE = 1 << 28
"""Bytes of an image's file."""
MOST_FILES = 1 << 24
"""Of a folder or archive."""
MOST_SCANS, MOST_SCANNED = 100, 1 << 31
"""Of a progressive JPEG, which has about ten, and their pixels, as each goes over all of it: `jpeg.c` has them too."""
MOST_CLASSES = 1_000_000
"""Labels below this are believed: whatever counts classes allocates for them."""
SETTINGS_BYTES = 1 << 16
"""Of a YAML file: recipes have 3 KiB."""
RESULT_BYTES = 1 << 24
"""Of a JSON file that a command wrote to say how it went."""
LIST_BYTES = 1 << 27
"""Of a file of names, one a line: ImageNet's 1.3 million take 40 MB."""
_LINE_BYTES = 1 << 20
_DEPTH = 20
_PLAIN = ("null", "bool", "int", "float")


def open_regular(path: Path | str) -> BinaryIO:
    """Return the regular file at `path`, open for reading. Raises OSError, for anything else too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: Path | str, most: int, remedy: str) -> bytes:
    """Return the content of a file of at most so many bytes. Raises InputError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise InputError(f"{path}: {size} bytes, and at most {most} are read: {remedy}")
            return file.read(size)
    except (OSError, ValueError) as error:  # a path may hold a NUL
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
        raise InputError(f"{path}: not text (it holds a NUL): {remedy}")
    return text


def read_json(path: Path | str, most: int, remedy: str, errors: str = "strict") -> Any:
    """Return what a JSON file says; NaN, infinities and a key given twice are refused. Raises InputError."""
    return parse_json(read_text(path, most, remedy, errors), path, remedy)


def parse_json(text: str, path: Path | str, remedy: str) -> Any:
    """Return what JSON from the file at `path` says, as `read_json` does."""
    try:
        found = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
        check_levels(found)
        return found
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}): {remedy}") from None


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a file with the JSON object that it is, up to the first that is none, such as one cut off.

    Raises OSError, and InputError for lines beyond all measure.
    """
    with open_regular(path) as file:
        while line := file.readline(_LINE_BYTES + 1):
            if len(line) > _LINE_BYTES:
                raise InputError(f"{path}: a line of more than {_LINE_BYTES} bytes: mend or remove the file")
            try:
                said = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(said, dict):
                return
            yield line.rstrip(b"\n") + b"\n", said


def check_levels(value: Any, levels: int = _DEPTH) -> None:
    """Raise ValueError for lists and mappings more than so many within each other, which recursion could not follow."""
    if not levels:
        raise ValueError(f"more than {_DEPTH} levels")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in [one for one in inner if isinstance(one, (dict, list))]:
        check_levels(one, levels - 1)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


class _Loader(yaml.SafeLoader):
    """Plain values: no tags, anchors or aliases, no key twice, twenty levels. A date is a word like any other."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has them
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in _PLAIN]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(None, None, "anchors are not read: write it out", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.constructor.ConstructorError(None, None, f"the tag {event.tag} is not read", event.start_mark)
        if self._level == _DEPTH:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_DEPTH} levels", event.start_mark)
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return found


def parse_yaml(text: str) -> Any:
    """Return what YAML `text` says, as plain values. Raises yaml.YAMLError and ValueError."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path | str, remedy: str) -> Any:
    """Return what a YAML file says. Raises InputError."""
    text = read_text(path, SETTINGS_BYTES, remedy)
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise InputError(f"{path}: not valid YAML ({detail}): {remedy}") from None
