"""Differences that a resumed run may have from its checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine.checkpoint import storage
from engine.config.cli import flat
from engine.config.renamed import translate
from engine.config.settings import Settings
from pipeline.system.errors import InputError

logger = logging.getLogger(__name__)
FREE = {"out", "resume", "allow_change", "log_every", "save_every", "keep", "keep_every", "tracker", "gradient_shares"}
FREE |= {"cpu", "compile", "cuda_graph", "activation_checkpointing", "collective_timeout", "step_timeout"}
FREE |= {f"data.{key}" for key in ("train", "eval", "eval_crop_ratio", "verify", "on_bad", "samples", "stall_timeout")}
FREE |= {f"data.{key}" for key in ("workers", "prefetch_factor", "backend", "hw_decoder_load")}
FREE |= {f"knn.{key}" for key in ("every", "k", "temperature", "limit")}
"""Settings that may differ, because they do not affect the training.

Of `data.train` and `data.eval` the path alone: the images are compared by fingerprint.
"""
FIXED = {"method.name", "method.queue_size", "method.queue_dtype", "optim.name", "data.batch", "data.order", "seed"}
FIXED |= {f"model.{key}" for key in ("arch", "stem", "width", "dim", "mlp_dim", "bn")}
FIXED |= {"model.zero_init_residual", "model.stop_grad_conv1"}
"""Settings that must not differ: the saved tensors or draws would not fit."""


def check(settings: Settings, train_images: str, knn_images: str | None) -> None:
    """Raise InputError if settings or images do not fit the checkpoint that `resume` names, if there is one.

    Runs before anything that takes long; the allowed differences are logged later, when the run is restored.
    train_images, knn_images: fingerprints of the data sets.
    """
    automatic = settings.resume == "auto"
    path = storage.last(Path(settings.out) / "checkpoints") if automatic else Path(settings.resume)
    if path is None or not settings.resume:
        return
    try:
        state = storage.read_state(path, tensors=False)
    except InputError:
        if automatic:
            return  # an earlier checkpoint will be resumed
        raise
    compare(settings, state["settings"], warn=False)
    compare_images(settings, knn_images, state.get("evaluated_on", ""), warn=False)
    before = state["loader"].get("fingerprint")
    if before != train_images:
        raise InputError(
            f"data.train {settings.data.train!r}: other images than the checkpoint's (fingerprint {train_images}, "
            f"there {before}): resume with the data that the run was started with"
        )


def compare(settings: Settings, saved: dict[str, Any], *, warn: bool = True) -> None:
    """Raise InputError for settings that differ from a checkpoint's and may not, and log those that are allowed to.

    saved: the checkpoint's nested settings, under present or former names.
    """
    then, now = flat(translate(saved)), flat(settings.as_dict())
    differing = [key for key in {**now, **then} if key not in FREE and then.get(key) != now.get(key)]
    for key in sorted(differing, key=lambda key: key != "method.name"):  # first, because others follow from it
        if key in FIXED:
            raise InputError(f"{key} {now.get(key)!r}: the checkpoint has {then.get(key)!r}: resume with that value")
    listed = ", ".join(f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in differing)
    allowed = tuple(f"{key}." for key in settings.allow_change)
    if refused := [key for key in differing if not f"{key}.".startswith(allowed)]:
        remedy = " ".join(f"--allow-change {key}" for key in refused)
        raise InputError(f"the checkpoint has other settings: {listed}: resume with its own, or add {remedy}")
    if differing and warn:
        logger.warning("resuming with other settings: %s", listed)


def compare_images(settings: Settings, images: str | None, saved: str, *, warn: bool = True) -> None:
    """Raise InputError if kNN classified other images in the checkpoint's run; log it if that is allowed.

    images, saved: fingerprints; none: nothing to compare.
    """
    if images is None or not saved or images == saved:
        return
    difference = f"data.eval {settings.data.eval!r}: other images than the checkpoint's"
    difference += f" (fingerprint {images}, there {saved})"
    if not {"data", "data.eval"} & set(settings.allow_change):
        raise InputError(f"{difference}, so that kNN would mix both: give those, or add --allow-change data.eval")
    if warn:
        logger.warning("%s: kNN classifies these from here on", difference)
