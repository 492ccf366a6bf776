"""Features of a pass over the training images, kept in a file each: whole, and taken up again for the same settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.evaluate.classification import Bench
from engine.parallel import collectives
from engine.parallel.consensus import broadcast_object
from pipeline.system.errors import describe_error

Pass = tuple[torch.Tensor, torch.Tensor]
"""Features bfloat16 [n, F] and ids int64 [n] of the images they are of."""


def take_up(bench: Bench, path: Path, settings: dict[str, Any]) -> Pass | None:
    """Return, on all processes, the pass in the file at `path`; None where there is none of those settings, whole."""
    read: dict[str, torch.Tensor] = {}
    like = broadcast_object(lambda: _read(bench, path, settings, read))
    if like is None:
        return None
    found = collectives.broadcast(read, like, bench.device)
    bench.say(f"features taken up from {path}")
    return found["features"], found["ids"]


def keep(bench: Bench, path: Path, settings: dict[str, Any], features: torch.Tensor, ids: torch.Tensor) -> None:
    """Write a pass to `path`, from the first process. Where it cannot be written that is told, and no more."""
    if not bench.first:
        return
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(exist_ok=True)
        tensors = {"features": features.cpu().contiguous(), "ids": ids.cpu().contiguous()}
        save_file(tensors, beside, metadata={"settings": json.dumps(settings, sort_keys=True)})
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        bench.say(f"warning: {path}: features are not kept ({describe_error(error)})")
    finally:
        beside.unlink(missing_ok=True)


def _read(bench: Bench, path: Path, settings: dict[str, Any], into: dict[str, torch.Tensor]) -> Any:
    """Return dtype and shape of the pass in the file, which goes `into`."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("settings") == json.dumps(settings, sort_keys=True)
        found = load_file(path) if known else {}
    except (OSError, SafetensorError, ValueError) as error:
        bench.say(f"warning: {path}: cannot be read ({describe_error(error)}): computed anew")
        return None
    if not known:
        bench.say(f"features in {path} are of other settings: computed anew")
        return None
    features, ids = (found.get(name, torch.zeros(0)) for name in ("features", "ids"))
    fit = features.dtype == torch.bfloat16 and features.shape == (len(ids), bench.backbone.features)
    fit = fit and ids.dtype == torch.int64 and ids.dim() == 1 and 0 < len(ids) <= len(bench.train)
    if not fit or int(ids.min()) < 0 or int(ids.max()) >= len(bench.train):
        bench.say(f"warning: {path}: holds other tensors than features of these images: computed anew")
        return None
    into |= {"features": features, "ids": ids}
    return collectives.described(into)
