"""Former names of settings: refused in recipes and on the command line, translated in the files of earlier runs."""

from typing import Any

import torch

from engine.config.setting_error import SettingError

RENAMED = {
    "accumulate": "gradient_accumulation_steps",
    "recompute": "activation_checkpointing",
    "data.ahead": "data.prefetch_factor",
    "data.eval_share": "data.eval_crop_ratio",
    "data.hardware_load": "data.hw_decoder_load",
    "model.frozen_patch": "model.stop_grad_conv1",
    "model.hidden": "model.mlp_dim",
    "model.zero_init": "model.zero_init_residual",
    "method.momentum": "method.ema_momentum",
    "method.momentum_schedule": "method.ema_schedule",
    "method.queue": "method.queue_size",
    "optim.by": "optim.schedule_interval",
    "optim.clip": "optim.clip_grad_norm",
    "optim.factor": "optim.gamma",
    "optim.trust": "optim.trust_coefficient",
}
"""Former to present name."""
_CROP_ON = {"cpu": "write data.backend ffcv", "gpu": "write data.backend ffcv_gpu"}


def former(key: str, value: Any = None) -> SettingError | None:
    """Return the error for a former name or value, with the present one; None for any other."""
    if key in RENAMED or key == "to":
        return SettingError(key, "", f"renamed to {RENAMED.get(key, 'out')}")
    if key == "data.order" and value == "chunked":
        return SettingError(key, "'chunked'", "renamed to quasi_random")
    if key == "data.crop_on":
        return SettingError(key, "", f"now part of data.backend: {_CROP_ON.get(str(value), 'leave it out')}")
    return None


def translate(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the nested settings of a run or checkpoint under their present names and values."""
    present = {key: _renamed(value, f"{key}.") if isinstance(value, dict) else value for key, value in settings.items()}
    present, data = _renamed(present), present.get("data")
    if isinstance(data, dict):
        if data.get("order") == "chunked":
            data["order"] = "quasi_random"
        if "crop_on" in data:
            data["backend"] = _backend(data.get("backend"), data.pop("crop_on"), bool(settings.get("cpu")))
    return present


def _renamed(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    names = {key: RENAMED.get(f"{section}{key}", "").rpartition(".")[2] or key for key in values}
    return {names[key]: value for key, value in values.items()}


def _backend(backend: Any, crop_on: Any, cpu: bool) -> Any:
    """Return the present backend for the former pair. Former ffcv cropped on the GPU, if there was one."""
    if backend == "ffcv":
        on_gpu = crop_on == "gpu" or (crop_on == "auto" and not cpu and torch.cuda.is_available())
        return "ffcv_gpu" if on_gpu else "ffcv"
    return "ffcv" if backend == "auto" and crop_on == "cpu" else backend
