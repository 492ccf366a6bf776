"""Training: settings, the loop, checkpoints, monitoring and evaluation, launched by Accelerate.

From Python: `Settings` and its sections, `pretrain`, `Callback`, `load_encoder`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config.settings import Data, Knn, Method, Model, Optim, Probe, Settings, Tracking
    from engine.monitoring.callback import Callback
    from engine.training.pretrain import pretrain
    from engine.weights.load import load_encoder

_SECTIONS = ("Data", "Knn", "Method", "Model", "Optim", "Probe", "Settings", "Tracking")
_MODULES = dict.fromkeys(_SECTIONS, "engine.config.settings")
_MODULES |= {"Callback": "engine.monitoring.callback", "pretrain": "engine.training.pretrain"}
_MODULES |= {"load_encoder": "engine.weights.load"}

__all__ = [
    "Callback",
    "Data",
    "Knn",
    "Method",
    "Model",
    "Optim",
    "Probe",
    "Settings",
    "Tracking",
    "load_encoder",
    "pretrain",
]


def __dir__() -> list[str]:
    """Return the public names too, for completion."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: commands need few of them."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
