"""Files written atomically: a reader finds the old content or the new, complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
"""Numbers of the OSErrors of a full or failing disk."""


@contextlib.contextmanager
def replacing(path: Path, *, unique: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`. Rename it to `path` after the block, or delete it on an error.

    unique: add the process id to its name. Otherwise the caller holds a lock, and a file that a killed process left is
    deleted first. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing" if unique else f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8. Raises OSError; the old content then stays, and no temporary file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, document: Any) -> None:
    """Write plain values as JSON, one value a line. Raises OSError."""
    write_atomic(path, json.dumps(document, indent=1) + "\n")
