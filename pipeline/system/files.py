"""Files written atomically: a reader finds the old content or the new, complete."""

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
def atomic_path(path: Path, *, unique: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`, of the same suffix. After the block, sync it and rename it to `path`.

    On an error the temporary file is deleted, and `path` is unchanged. Raises OSError.
    unique: add the process id to the name. Otherwise the caller holds a lock; a file of a killed process is deleted.
    """
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}" if unique else f".writing-{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        replace_synced(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_synced(source: Path, path: Path) -> None:
    """Sync a file and rename it to `path`. Raises OSError."""
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    os.replace(source, path)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8. Raises OSError; the old content then stays, and no temporary file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, document: Any) -> None:
    """Write plain values as JSON, one value a line. Raises OSError."""
    write_atomic(path, json.dumps(document, indent=1) + "\n")
