"""Names of several files in one: shell patterns, and braces in WebDataset's notation."""

import glob
import os
import re
from collections.abc import Iterator
from itertools import islice

from pipeline.system.errors import InputError

_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")
_MAX_FILES, _MAX_BRACES = 100_000, 8


def is_pattern(source: str) -> bool:
    """Return whether `source` is a pattern, such as `train-*.tar` or `train-{000..127}.tar`, and no file's name."""
    return bool(glob.has_magic(source) or _BRACES.search(source)) and not os.path.exists(source)


def matching_paths(source: str) -> list[str]:
    """Return the paths of a pattern, in order; another source as it is. Raises InputError for too many, or none."""
    matching = (
        path for name in _expanded(source) for path in (sorted(glob.glob(name)) if is_pattern(name) else [name])
    )
    paths = list(islice(matching, _MAX_FILES + 1))
    if len(paths) > _MAX_FILES:
        raise InputError(f"{source[:200]}: names more than {_MAX_FILES} files: give fewer at once")
    if not paths:
        raise InputError(f"{source}: no such files: correct the pattern")
    return paths


def _expanded(source: str) -> Iterator[str]:
    """Yield the names for braces such as {000..127} or {a,b}."""
    braces = _BRACES.search(source)
    if braces is None or os.path.exists(source):
        yield source
        return
    if source.count("{") > _MAX_BRACES:
        raise InputError(f"{source[:200]}: has more than {_MAX_BRACES} braces: give fewer")
    first, last, listed = braces.groups()
    parts = listed.split(",") if listed else (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    for part in parts:
        yield from _expanded(source[: braces.start()] + part + source[braces.end() :])
