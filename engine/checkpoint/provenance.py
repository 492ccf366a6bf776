"""What a run was made by, as its checkpoints record it, and as model cards say."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

from pipeline.beton import Beton, count_classes
from pipeline.system.packages import version
from pipeline.system.text import printable

_ROOT = Path(__file__).resolve().parents[2]
_LONGEST = 100  # characters of a value that is told of
_KINDS = {"version": str, "commit": str, "images": int, "classes": int, "fingerprint": str}


def origin(train_set: Beton) -> dict[str, Any]:
    """Return version and commit of this tree, and number of images and classes of the training set: plain values.

    commit: ends in `-dirty` where files that git knows were changed; left out where the tree is no repository.
    """
    found = {"version": version("millrace") or "unknown", "images": len(train_set), "classes": count_classes(train_set)}
    return found | ({"commit": commit()} if commit() else {})


@functools.cache
def commit() -> str:
    """Return the commit of this tree as it was when first asked for; empty where the tree is no repository."""
    if not (_ROOT / ".git").exists():  # an installed copy, whatever repository may be around it
        return ""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def recorded(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint's state.json says of that, with the training data's fingerprint; older ones say less."""
    made, loader = state.get("origin"), state.get("loader")
    found = dict(made) if isinstance(made, dict) else {}
    found["fingerprint"] = loader.get("fingerprint") if isinstance(loader, dict) else None
    kept = {key: found[key] for key, kind in _KINDS.items() if type(found.get(key)) is kind}
    return {key: printable(value[:_LONGEST]) if isinstance(value, str) else value for key, value in kept.items()}
