"""Provenance of a run, recorded in its checkpoints and in model cards: version, commit, training set."""

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

from pipeline.beton import Beton, count_classes
from pipeline.system.packages import version
from pipeline.system.text import printable

_ROOT = Path(__file__).resolve().parents[2]
_MAX_CHARACTERS = 100  # characters of a value read from a checkpoint
_KINDS = {"version": str, "commit": str, "images": int, "classes": int, "fingerprint": str, "started_from": str}


def origin(train_set: Beton) -> dict[str, Any]:
    """Return version and commit of this tree, and number of images and classes of the training set: plain values.

    commit: ends in `-dirty` where tracked files were changed; left out if the tree is not a repository.
    """
    values = {
        "version": version("millrace") or "unknown",
        "images": len(train_set),
        "classes": count_classes(train_set),
    }
    return values | ({"commit": commit()} if commit() else {})


@functools.cache
def commit() -> str:
    """Return the commit of this tree at the first call; empty if the tree is not a repository."""
    if not (_ROOT / ".git").exists():  # an installed copy, perhaps within another repository
        return ""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def recorded(state: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance in a checkpoint's state, with the training data's fingerprint and the weights' source."""
    saved, loader, source = state.get("origin"), state.get("loader"), state.get("started_from")
    values = dict(saved) if isinstance(saved, dict) else {}
    if isinstance(source, dict) and source:
        values["started_from"] = f"{Path(str(source.get('file'))).name}, {source.get('kind')}"
    values["fingerprint"] = loader.get("fingerprint") if isinstance(loader, dict) else None
    valid = {key: values[key] for key, kind in _KINDS.items() if type(values.get(key)) is kind}
    return {key: printable(v[:_MAX_CHARACTERS]) if isinstance(v, str) else v for key, v in valid.items()}
