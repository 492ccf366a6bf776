"""Losses are computed in float32 at least, whatever the autocast type."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch

P = ParamSpec("P")


def full_precision(function: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Return `function` (of a tensor first) outside autocast, its float16 and bfloat16 tensors turned to float32."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        device = args[0].device.type  # type: ignore[attr-defined]
        with torch.autocast(device, enabled=False):
            return function(*map(_raised, args), **{k: _raised(v) for k, v in kwargs.items()})  # type: ignore[arg-type]

    return run


def _raised(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value
