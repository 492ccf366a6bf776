"""Many tensors in one piece of memory, so that one operation reaches them all."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_ALIGNMENT = 64  # elements: whole cache lines, and more than any kernel's vector loads ask for


@torch.no_grad()
def flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Move tensors of one dtype and device into one new buffer, of which they become parts; return it.

    Values, shapes and strides stay. The tensors must be dense, as parameters and buffers are, else ValueError. What
    gives them other memory afterwards takes them out of the buffer: moving them to another device, dtype or memory
    format, `load_state_dict(assign=True)`, or being flattened again; `refuse_strays` shows it. Between them is 0.
    """
    given = list(tensors)
    for tensor in given:
        if sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1 > tensor.numel() > 0:
            raise ValueError(f"a tensor of shape {list(tensor.shape)} has gaps: strides {list(tensor.stride())}")
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


def refuse_strays(tensors: Iterable[torch.Tensor], flat: torch.Tensor) -> None:
    """Raise RuntimeError where tensors that `flatten` made parts of `flat` have come to lie elsewhere."""
    home = flat.untyped_storage().data_ptr()
    strays = sum(t.untyped_storage().data_ptr() != home for t in tensors if t.numel())
    if strays:
        raise RuntimeError(
            f"{strays} tensors have left their common buffer, and would no longer be updated: build the step after "
            "moving, casting or assigning parameters and buffers, and only once"
        )


class Buffers:
    """The buffers of modules, such as running statistics, that can be kept and put back on the device."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for module in modules:
            for buffer in module.buffers():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._parts = list(by_dtype.values())
        self._flat = [flatten(buffers) for buffers in self._parts]

    def check(self) -> None:
        """Raise RuntimeError where a buffer has been given other memory."""
        for buffers, flat in zip(self._parts, self._flat, strict=True):
            refuse_strays(buffers, flat)

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
