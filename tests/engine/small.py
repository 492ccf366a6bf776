"""Small models and batches in float64 for tests of the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from engine.config.settings import Data, Method, Optim, Settings
from engine.config.settings import Model as ModelSettings
from engine.training.model import Model, build_model
from methods.registry import Terms
from pipeline.loader import Batch

BATCH, SIZE, LENGTH = 8, 8, 20


def settings(
    name: str = "moco_v2", terms: Terms | None = None, bn: str = "plain", batch: int = BATCH, **method: Any
) -> Settings:
    """Return settings of a run so small that float64 is quick: no terms, momentum 0.9, a constant learning rate."""
    method = {"ema_momentum": 0.9, "ema_schedule": "constant"} | method if name != "simclr" else method
    queue = {"queue_size": LENGTH} if name in ("moco_v1", "moco_v2") else {}
    return Settings(
        data=Data(size=SIZE, batch=batch),
        model=ModelSettings("resnet18", "small", 0.125, 16, None if name == "moco_v1" else 24, bn),  # type: ignore[arg-type]
        method=Method(name=name, **queue, **method),  # type: ignore[arg-type]
        terms=terms or Terms(),
        optim=Optim(lr=0.1, schedule="constant"),
        precision="no",
    )


def built(chosen: Settings, accelerator: Accelerator | None = None) -> Model:
    """Return the model of those settings in float64, with weights from their seed."""
    accelerator = accelerator or Accelerator(cpu=True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = build_model(chosen, accelerator)
    finally:
        torch.set_default_dtype(default)
    if model.queue is not None:
        model.queue.double()
    return model


def views(seed: int, batch: int = BATCH, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two random views of a global batch."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, b


def batch_of(*given: torch.Tensor, **more: Any) -> Batch:
    """Return a batch of those views, like the loader's."""
    return Batch(given, np.arange(len(given[0])), 0, 0, 0.0, **more)


def everything(model: Model) -> dict[str, torch.Tensor]:
    """Return all tensors that a step may change."""
    modules = {"online": model.step.encoder, "target": model.target, "queue": model.queue, "at": model.step.schedule}
    tensors = {f"{n}.{k}": v for n, m in modules.items() if m is not None for k, v in m.state_dict().items()}
    tensors |= {
        f"{index}|{key}": value
        for index, state in enumerate(model.optimizer.state.values())
        for key, value in state.items()
    }
    return {key: value.clone() for key, value in tensors.items() if key != "at.skipped"}
