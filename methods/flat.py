"""Many tensors in one piece of memory, so that one operation reaches them all."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_ALIGNMENT = 64  # elements: whole cache lines, and more than any kernel's vector loads ask for


@torch.no_grad()
def flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Move tensors of one dtype and device into one new buffer, of which they become parts; return it.

    Values, shapes and strides stay. The tensors must be dense, as parameters and buffers are; do not move them to
    another device, dtype or memory format afterwards. What lies between them is 0.
    """
    given = list(tensors)
    starts = [0]
    for tensor in given:
        starts.append(starts[-1] + -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT)
    like = {(tensor.dtype, tensor.device) for tensor in given}
    if len(like) > 1:
        raise ValueError(f"tensors of several dtypes or devices: {sorted(map(str, like))}")
    flat = given[0].new_zeros(starts[-1]) if given else torch.zeros(0)
    for tensor, start in zip(given, starts, strict=False):
        part = flat.as_strided(tensor.shape, tensor.stride(), start)
        part.copy_(tensor)
        tensor.data = part
    return flat


class Buffers:
    """The buffers of modules, such as running statistics, that can be kept and put back on the device."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for module in modules:
            for buffer in module.buffers():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._flat = [flatten(buffers) for buffers in by_dtype.values()]

    def kept(self) -> list[torch.Tensor]:
        """Return a copy of their values."""
        return [flat.clone() for flat in self._flat]

    def restore_unless(self, condition: torch.Tensor, kept: list[torch.Tensor]) -> None:
        """Put back `kept` where `condition`, one bool on the device, is false. Waits for nothing."""
        for flat, before in zip(self._flat, kept, strict=True):
            torch.where(condition, flat, before, out=flat)

    def restore(self, kept: list[torch.Tensor]) -> None:
        """Put back `kept`."""
        torch._foreach_copy_(self._flat, kept)
