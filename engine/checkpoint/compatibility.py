"""In what a run may differ from the checkpoint that it goes on from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from engine.checkpoint import storage
from engine.config.cli import flat
from engine.config.renamed import translate
from engine.config.settings import Settings
from pipeline.system.errors import InputError

FREE = {"out", "resume", "allow_change", "log_every", "save_every", "keep", "keep_every", "tracker", "gradient_shares"}
FREE |= {"cpu", "compile", "cuda_graph", "activation_checkpointing", "collective_timeout", "step_timeout"}
FREE |= {f"data.{key}" for key in ("train", "eval", "eval_crop_ratio", "verify", "on_bad", "samples", "stall_timeout")}
FREE |= {f"data.{key}" for key in ("workers", "prefetch_factor", "backend", "hw_decoder_load")}
FREE |= {f"knn.{key}" for key in ("every", "k", "temperature", "limit")}
"""Settings in which a resumed run may differ from its checkpoint: they do not bear on what is trained.

Of `data.train` and `data.eval` the path alone: the images behind it are compared too.
"""
FIXED = {"method.name", "method.queue_size", "method.queue_dtype", "optim.name", "data.batch", "data.order", "seed"}
FIXED |= {
    f"model.{key}" for key in ("arch", "stem", "width", "dim", "mlp_dim", "bn", "zero_init_residual", "stop_grad_conv1")
}
"""Those in which it cannot: what is saved would not fit."""


def check(settings: Settings, train_images: str, knn_images: str | None) -> None:
    """Refuse other settings or images than those of the checkpoint that `resume` names, where there is one.

    For the time before anything that takes long; what is allowed to change is told when the run is restored. Images
    are given by the fingerprints of their data sets.
    """
    automatic = settings.resume == "auto"
    path = storage.last(Path(settings.out) / "checkpoints") if automatic else Path(settings.resume)
    if path is None or not settings.resume:
        return
    try:
        state = storage.read_state(path, tensors=False)
    except InputError:
        if automatic:
            return  # it will be passed over for an earlier one
        raise
    compare(settings, state["settings"], told=False)
    compare_images(settings, knn_images, state.get("evaluated_on", ""), told=False)
    before = state["loader"].get("fingerprint")
    if before != train_images:
        raise InputError(
            f"data.train {settings.data.train!r}: other images than the checkpoint's (fingerprint {train_images}, "
            f"there {before}): resume with the data that the run was started with"
        )


def compare(settings: Settings, saved: dict[str, Any], *, told: bool = True) -> None:
    """Refuse a checkpoint of other settings, but for those that are free, or allowed to change: those are told."""
    then, now = flat(translate(saved)), flat(settings.as_dict())
    differing = [key for key in {**now, **then} if key not in FREE and then.get(key) != now.get(key)]
    for key in sorted(differing, key=lambda key: key != "method.name"):  # which decides over others
        if key in FIXED:
            raise InputError(f"{key} {now.get(key)!r}: the checkpoint has {then.get(key)!r}: resume with that value")
    if not differing:
        return
    listed = ", ".join(f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in differing)
    allowed = settings.allow_change
    if refused := [key for key in differing if not any(key == a or key.startswith(f"{a}.") for a in allowed)]:
        raise InputError(
            f"the checkpoint has other settings: {listed}: resume with its own, or add "
            + " ".join(f"--allow-change {key}" for key in refused)
        )
    if told:
        print(f"warning: resuming with other settings: {listed}", file=sys.stderr)


def compare_images(settings: Settings, own: str | None, before: str, *, told: bool = True) -> None:
    """Refuse to classify other images by kNN than the checkpoint's run did, unless that is allowed, and told.

    Both by their fingerprint; none: nothing to compare.
    """
    if own is None or not before or own == before:
        return
    says = f"data.eval {settings.data.eval!r}: other images than the checkpoint's"
    says += f" (fingerprint {own}, there {before})"
    if not {"data", "data.eval"} & set(settings.allow_change):
        raise InputError(f"{says}, so that kNN would be of both: give those, or add --allow-change data.eval")
    if told:
        print(f"warning: {says}: kNN is of these from here on", file=sys.stderr)
