"""Settings and images in which a resumed run may differ from its checkpoint."""

from pathlib import Path
from typing import Any

from engine.checkpoint import storage
from engine.config.cli import flat
from engine.config.renamed import translate
from engine.config.settings import Settings
from pipeline.system.errors import InputError

FREE = {"out", "resume", "allow_change", "log_every", "save_every", "keep", "keep_every", "tracker", "gradient_shares"}
FREE |= {
    "cpu",
    "require_gpu",
    "compile",
    "cuda_graph",
    "activation_checkpointing",
    "collective_timeout",
    "step_timeout",
}
FREE |= {f"data.{key}" for key in ("train", "eval", "eval_crop_ratio", "verify", "on_bad", "samples", "stall_timeout")}
FREE |= {f"data.{key}" for key in ("workers", "prefetch_factor", "backend", "hw_decoder_load")}
FREE |= {f"knn.{key}" for key in ("every", "k", "temperature", "limit", "bank")} | {"probe.every", "probe.lr"}
FREE |= {f"tracking.{key}" for key in ("project", "name", "group", "tags", "images")}
"""Settings that may differ: they do not change the training.

Of `data.train` and `data.eval` the path alone: the images are compared too.
"""
FIXED = {"method.name", "method.queue_size", "method.queue_dtype", "optim.name", "data.batch", "data.order", "seed"}
FIXED |= {f"model.{key}" for key in ("arch", "stem", "width", "dim", "mlp_dim", "bn")}
FIXED |= {"model.zero_init_residual", "model.stop_grad_conv1"}
FIXED |= {f"model.{key}" for key in ("init", "init_which", "init_heads", "init_prefix")}
"""Settings that may never differ: the saved state would not fit."""


def check(settings: Settings, train_images: str, knn_images: str | None) -> None:
    """Compare settings and images with the checkpoint that `resume` names, if any, before anything that takes long.

    Reads no tensors. Raises InputError.
    """
    automatic = settings.resume == "auto"
    path = storage.last(Path(settings.out) / "checkpoints") if automatic else Path(settings.resume)
    if path is None or not settings.resume:
        return
    try:
        state = storage.read_state(path, tensors=False)
    except InputError:
        if automatic:
            return  # it will be skipped for an earlier one
        raise
    compare(settings, state, train_images, knn_images)


def compare(settings: Settings, state: dict[str, Any], train_images: str, knn_images: str | None) -> list[str]:
    """Raise InputError where settings or images differ from those of a checkpoint's state, and may not.

    Images are given by the fingerprints of their data sets. Returns warnings of differences that were allowed.
    """
    warnings = [
        compare_settings(settings, state["settings"]),
        compare_knn_images(settings, knn_images, state.get("evaluated_on", "")),
    ]
    saved = state["loader"].get("fingerprint")
    if saved != train_images:
        raise InputError(
            f"data.train {settings.data.train!r}: other images than the checkpoint's (fingerprint {train_images}, "
            f"there {saved}): resume with the data that the run was started with"
        )
    return [warning for warning in warnings if warning]


def compare_settings(settings: Settings, saved: dict[str, Any]) -> str:
    """Raise InputError for a setting that differs and is neither free nor allowed; return a warning of allowed ones."""
    then, now = flat(translate(saved)), flat(settings.as_dict())
    defaults = flat(Settings().as_dict())  # of settings that older versions did not have
    then = {key: value for key, value in defaults.items() if not key.startswith("terms.")} | then
    differing = [key for key in {**now, **then} if key not in FREE and then.get(key) != now.get(key)]
    for key in sorted(differing, key=lambda key: key != "method.name"):  # other defaults follow from the method
        if key in FIXED:
            raise InputError(f"{key} {now.get(key)!r}: the checkpoint has {then.get(key)!r}: resume with that value")
    if not differing:
        return ""
    listed = ", ".join(f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in differing)
    allowed = settings.allow_change
    if refused := [key for key in differing if not any(key == a or key.startswith(f"{a}.") for a in allowed)]:
        raise InputError(
            f"the checkpoint has other settings: {listed}: resume with its own, or add "
            + " ".join(f"--allow-change {key}" for key in refused)
        )
    return f"resuming with other settings: {listed}"


def compare_knn_images(settings: Settings, images: str | None, saved: str) -> str:
    """Raise InputError where kNN would classify other images than before; return a warning where that is allowed.

    Images by their fingerprint; None or an empty one: nothing to compare.
    """
    if images is None or not saved or images == saved:
        return ""
    prints = f"fingerprint {images}, there {saved}"
    bank = f" with knn.bank {settings.knn.bank!r}" if settings.knn.bank else ""
    problem = f"data.eval {settings.data.eval!r}{bank}: other images than the checkpoint's ({prints})"
    if not {"data", "data.eval"} & set(settings.allow_change):
        raise InputError(f"{problem}, so that kNN would mix both: give those, or add --allow-change data.eval")
    return f"{problem}: kNN classifies these from here on"
