"""BatchNorm by parts of a batch on the CPU: one compiled pass forward and one backward for all parts.

torch takes a call for each part, and for small layers the calls cost more than the arithmetic. Sums run in float32 over
blocks of rows, and in float64 over the blocks. Needs numba; without it `available` is False.

The passes are operators of torch, `millrace::norm_parts` and `millrace::norm_parts_backward`, so that dispatch modes
see them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

try:
    import numba
    from numba.extending import intrinsic
except ImportError:
    numba = None  # type: ignore[assignment]

_BLOCK_ROWS = 128
_LARGEST = 1 << 16  # values for each thread of torch; of more, torch's code uses all threads, and this uses one


def available(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Return whether `normalize` takes x, [B, C] or [B, C, H, W], with these statistics and parameters.

    They must be float32, on the CPU, and x not so large that several threads are faster.
    """
    threads = torch.get_num_threads()
    if numba is None or (threads > 2 and x.numel() > _LARGEST * threads):
        return False
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (x, *others))


def normalize(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    parts: int,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """Return x, whose batch consists of `parts` parts, normalized by each part's statistics.

    x: [B, C] or [B, C, H, W], float32. The result is channels-last. Running statistics [C] move once for each part.
    Raises ValueError where a part has one value a channel.
    """
    return _Normalize.apply(x, running_mean, running_var, weight, bias, parts, momentum, eps)  # type: ignore[no-any-return]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mean: Any, var: Any, weight: Any, bias: Any, parts: int, *rest: Any) -> Any:
        out, statistics = _OPERATORS.norm_parts(x, mean, var, weight, bias, parts, *rest)
        ctx.save_for_backward(x, weight, statistics)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        x_gradient, sums = _OPERATORS.norm_parts_backward(gradient, x, weight, statistics)
        weight_gradient, bias_gradient = sums if weight is not None else (None, None)
        return x_gradient, None, None, weight_gradient, bias_gradient, None, None, None


# ---- operators ----


def _norm_parts(
    x: torch.Tensor, mean: Any, var: Any, weight: Any, bias: Any, parts: int, momentum: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x = _dense(x)
    channels = x.shape[1]
    rows = x.numel() // channels // parts
    if rows == 1:
        raise ValueError(f"{tuple(x.shape)} in {parts} parts: each part needs more than one value a channel")
    out, statistics = torch.empty_like(x), x.new_empty(2, parts, channels)
    arrays = _addresses(x, weight, bias, mean, var, out, statistics)
    _compiled()[0](*arrays, parts, rows, channels, momentum, eps)
    return out, statistics


def _norm_parts_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: Any, statistics: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gradient, x = _dense(gradient), _dense(x)
    _, parts, channels = statistics.shape
    x_gradient, sums = torch.empty_like(x), x.new_empty(2, channels)
    arrays = _addresses(gradient, x, weight, statistics, x_gradient, sums)
    _compiled()[1](*arrays, parts, x.numel() // channels // parts, channels)
    return x_gradient, sums


_LIBRARY = torch.library.Library("millrace", "FRAGMENT")
_LIBRARY.define(
    "norm_parts(Tensor x, Tensor(a!)? mean, Tensor(b!)? var, Tensor? weight, Tensor? bias, int parts, float momentum, "
    "float eps) -> (Tensor, Tensor)"
)
_LIBRARY.define("norm_parts_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor statistics) -> (Tensor, Tensor)")
_LIBRARY.impl("norm_parts", _norm_parts, "CPU")
_LIBRARY.impl("norm_parts_backward", _norm_parts_backward, "CPU")
_OPERATORS = torch.ops.millrace


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def _addresses(*tensors: torch.Tensor | None) -> list[int]:
    """Return the addresses of the tensors' values, 0 for None: to pass them to compiled code costs less than arrays."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


# ---- compiled code ----


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the compiled forward and backward functions, made at the first call and cached on disk."""
    integer, real = numba.intp, numba.float64
    return (
        _compile(_forward, numba.void(*[integer] * 10, real, real)),
        _compile(_backward, numba.void(*[integer] * 9)),
    )


def _compile(function: Callable[..., None], signature: Any) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "nsz", "reassoc"}, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no writable folder for the cache
        return numba.njit(signature, **options)(function)


def _forward(
    x_at: int,
    weight_at: int,
    bias_at: int,
    running_mean_at: int,
    running_var_at: int,
    out_at: int,
    statistics_at: int,
    parts: int,
    rows: int,
    channels: int,
    momentum: float,
    eps: float,
) -> None:
    """Write normalized rows to out, [parts, rows, channels], and means and 1 / deviations to statistics."""
    x, out = _array(x_at, (parts, rows, channels)), _array(out_at, (parts, rows, channels))
    statistics = _array(statistics_at, (2, parts, channels))
    scale, shift = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    blocks, totals = np.zeros((2, channels), np.float32), np.zeros((2, channels), np.float64)
    count = np.float64(rows)
    for part in range(parts):
        mean, inverse = statistics[0, part], statistics[1, part]
        for c in range(channels):
            mean[c] = x[part, 0, c]  # at first, then corrected: sums of small deviations are precise
        for _ in range(2):
            _clear(totals)
            for start in range(0, rows, _BLOCK_ROWS):
                _clear(blocks)
                for row in range(start, min(start + _BLOCK_ROWS, rows)):
                    for c in range(channels):
                        deviation = x[part, row, c] - mean[c]
                        blocks[0, c] += deviation
                        blocks[1, c] += deviation * deviation
                for c in range(channels):
                    totals[0, c] += blocks[0, c]
                    totals[1, c] += blocks[1, c]
            for c in range(channels):
                mean[c] += totals[0, c] / count
        for c in range(channels):
            totals[1, c] -= totals[0, c] * totals[0, c] / count
            inverse[c] = 1 / np.sqrt(totals[1, c] / count + eps)
            scale[c], shift[c] = inverse[c], 0
        if running_mean_at:
            running_mean, running_var = _array(running_mean_at, (channels,)), _array(running_var_at, (channels,))
            for c in range(channels):
                running_mean[c] += momentum * (mean[c] - running_mean[c])
                running_var[c] += momentum * (totals[1, c] / (count - 1) - running_var[c])
        if weight_at:
            weight, bias = _array(weight_at, (channels,)), _array(bias_at, (channels,))
            for c in range(channels):
                scale[c], shift[c] = inverse[c] * weight[c], bias[c]
        for row in range(rows):
            for c in range(channels):
                out[part, row, c] = (x[part, row, c] - mean[c]) * scale[c] + shift[c]


def _backward(
    gradient_at: int,
    x_at: int,
    weight_at: int,
    statistics_at: int,
    x_gradient_at: int,
    sums_at: int,
    parts: int,
    rows: int,
    channels: int,
) -> None:
    """Write the gradient of x, and of weight and bias to sums, [2, channels]."""
    gradient, x = _array(gradient_at, (parts, rows, channels)), _array(x_at, (parts, rows, channels))
    statistics, x_gradient = _array(statistics_at, (2, parts, channels)), _array(x_gradient_at, (parts, rows, channels))
    sums = _array(sums_at, (2, channels))
    _clear(sums)
    blocks, totals = np.zeros((2, channels), np.float32), np.zeros((2, channels), np.float64)
    scale, slope = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    offset = np.zeros(channels, np.float32)
    for part in range(parts):
        mean, inverse = statistics[0, part], statistics[1, part]
        _clear(totals)
        for start in range(0, rows, _BLOCK_ROWS):
            _clear(blocks)
            for row in range(start, min(start + _BLOCK_ROWS, rows)):
                for c in range(channels):
                    value = gradient[part, row, c]
                    blocks[0, c] += value
                    blocks[1, c] += value * (x[part, row, c] - mean[c])
            for c in range(channels):
                totals[0, c] += blocks[0, c]
                totals[1, c] += blocks[1, c]
        for c in range(channels):
            scale[c] = inverse[c]
            offset[c] = totals[0, c] / rows
            slope[c] = totals[1, c] * inverse[c] * inverse[c] / rows
            sums[0, c] += totals[1, c] * inverse[c]
            sums[1, c] += totals[0, c]
        if weight_at:
            weight = _array(weight_at, (channels,))
            for c in range(channels):
                scale[c] *= weight[c]
        for row in range(rows):
            for c in range(channels):
                deviation = x[part, row, c] - mean[c]
                x_gradient[part, row, c] = (gradient[part, row, c] - offset[c] - deviation * slope[c]) * scale[c]


if numba is not None:

    @intrinsic  # type: ignore[untyped-decorator]
    def _pointer(typing_context: Any, address: Any) -> Any:
        """Return an address as a pointer to float32."""
        signature = numba.types.CPointer(numba.float32)(numba.intp)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    @numba.njit  # type: ignore[untyped-decorator]
    def _clear(sums: Any) -> None:
        for row in range(sums.shape[0]):
            for c in range(sums.shape[1]):
                sums[row, c] = 0

    @numba.njit  # type: ignore[untyped-decorator]
    def _array(address: int, shape: Any) -> Any:
        """Return the float32 array of that shape at an address."""
        return numba.carray(_pointer(address), shape)  # type: ignore[call-arg]
