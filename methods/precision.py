"""Losses are computed in float32 at least, whatever the autocast type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch

P = ParamSpec("P")
_STORED = ("queue", "negatives")


def full_precision(function: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Return `function`, whose first argument is a tensor, run outside autocast on float32 in place of half precision.

    All float16 and bfloat16 arguments are cast but `queue` and `negatives`, which may be large: `similarities` takes
    these as they are stored.
    """
    names = tuple(inspect.signature(function).parameters)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        raised = {name: value if name in _STORED else _raised(value) for name, value in given.items()}
        with torch.autocast(raised[names[0]].device.type, enabled=False):
            return function(**raised)  # type: ignore[call-arg, arg-type]

    return run


def _raised(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value
