"""Losses in float32 or better, whatever the autocast dtype."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch

P = ParamSpec("P")
_STORED = ("queue", "negatives")


def full_precision(function: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Run `function`, whose first argument is a tensor, outside autocast, with half-precision arguments in float32.

    `queue` and `negatives`, which may be large, are not cast: `similarities` reads them as stored.
    """
    names = tuple(inspect.signature(function).parameters)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        arguments: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        arguments = {name: value if name in _STORED else _upcast(value) for name, value in arguments.items()}
        with torch.autocast(arguments[names[0]].device.type, enabled=False):
            return function(**arguments)  # type: ignore[call-arg, arg-type]

    return run


def _upcast(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
