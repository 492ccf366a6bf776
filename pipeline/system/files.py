"""Small files, written beside their place and renamed: whoever reads one finds the old content or the new, whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8. Raises OSError; what was there before then stays, and nothing lies beside it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write plain values as JSON of one value a line. Raises OSError."""
    write_atomic(path, json.dumps(document, indent=1) + "\n")
