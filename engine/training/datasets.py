"""The data sets of a run: opened, verified where that is asked for, and the same on all processes."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
from accelerate import Accelerator

from engine.config.settings import Settings
from engine.evaluate.online_knn import Knn
from engine.parallel.consensus import from_all, together
from engine.parallel.rendezvous import cores_here, rank
from pipeline.beton import Beton
from pipeline.inspect import verify
from pipeline.sampling.substitutes import Substitutes
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError

_NAMED = 10  # damaged records in a message
_VERIFICATION = timedelta(days=2)  # that the slowest process may take


def open_sets(settings: Settings) -> tuple[Beton, Beton | None]:
    """Return the training set and, if there is one, that for kNN. Raises InputError, on all processes alike."""
    train_set = together(lambda: _open(settings, "train"), lambda beton: {"data.train": beton.fingerprint})
    asked = settings.data.eval and settings.knn.every
    eval_set = together(
        lambda: _open(settings, "eval") if asked else None, lambda beton: {"data.eval": beton and beton.fingerprint}
    )
    return train_set, eval_set


def verify_sets(settings: Settings, train_set: Beton, eval_set: Beton | None) -> None:
    """Check every record where `data.verify` is full, which may take long. Raises InputError, on all processes alike.

    Damaged ones that `data.on_bad` passes over become `unreadable`: to be called before a loader is built.
    """
    if settings.data.verify != "full":
        return
    _verify(settings, "train", train_set)
    if eval_set is not None and eval_set.fingerprint != train_set.fingerprint:
        _verify(settings, "eval", eval_set)
    elif eval_set is not None:
        eval_set.unreadable |= train_set.unreadable


def _open(settings: Settings, name: str) -> Beton:
    path, key = getattr(settings.data, name), f"data.{name}"
    if not path:
        raise InputError(f"{key} is not set: give a beton, --{key} F.beton; write one with python -m pipeline.prepare")
    return open_data(path, tolerate=settings.data.on_bad == "skip")


def _verify(settings: Settings, name: str, beton: Beton) -> None:
    """Check every record; those of each machine's copy are shared by its processes.

    A record that is damaged on any machine is passed over on all, or ends the run on all: as `data.on_bad` says.
    """
    local, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = np.array_split(np.arange(len(beton)), processes)[local].tolist()
    everyone = from_all(lambda: [platform.node(), verify(beton, own, quiet=local > 0)], _VERIFICATION)
    faults = {int(sample): f"{fault}, on {host}" for host, found in everyone for sample, fault in found}
    if not faults:
        return
    numbers = ", ".join(map(str, sorted(faults)[:_NAMED])) + (", ..." if len(faults) > _NAMED else "")
    says = f"{beton.path}: {len(faults)} of {len(beton)} records are damaged, samples {numbers}"
    if settings.data.on_bad == "error":
        first = min(faults)
        _refuse(
            f"{says} (the first, {beton.name(first)}: {faults[first]}): write the file again with python -m "
            "pipeline.prepare, or pass over them with --data.on_bad skip"
        )
    beton.unreadable |= frozenset(faults)
    together(lambda: Substitutes(beton, "skip"))  # refuses too many
    if rank() == 0:
        print(f"warning: data.{name}: {says}: passed over", file=sys.stderr)


def _refuse(message: str) -> None:
    """Raise InputError with a message that all processes have come to, for the first of them to report."""

    def refuse() -> None:
        raise InputError(message)

    together(refuse)


def build_knn(settings: Settings, train_set: Beton, eval_set: Beton, accelerator: Accelerator) -> Knn:
    """Return what classifies the images of `eval_set` by their neighbors of `train_set`."""
    knn = settings.knn
    backend = "ffcv_gpu" if accelerator.device.type == "cuda" and settings.data.backend != "ffcv" else "ffcv"
    if not (train_set.in_one_file and eval_set.in_one_file):
        backend = "dali"
    return Knn(
        train_set,
        eval_set,
        backend=backend,  # never resident: each image is read once
        k=knn.k,
        temperature=knn.temperature,
        limit=knn.limit,
        batch=max(256, settings.data.batch),
        share=settings.data.eval_crop_ratio,
        **loading(settings, accelerator),
    )


def loading(settings: Settings, accelerator: Accelerator) -> Mapping[str, Any]:
    """Return the options that all loaders of a run have."""
    data = settings.data
    return {
        "size": data.size,
        "device": accelerator.device,
        "workers": data.workers or cores_here(),
        "stall_timeout": data.stall_timeout,
        "hw_decoder_load": data.hw_decoder_load,
        "on_bad": data.on_bad,
    }
