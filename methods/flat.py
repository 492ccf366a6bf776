"""Many tensors in one buffer, for one operation on all of them."""

from collections.abc import Iterable

import torch

_ALIGNMENT = 64  # elements: full cache lines, and more than any kernel's vector loads need


@torch.no_grad()
def flatten(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Move tensors of one dtype and device into one new buffer, make them views of it, and return it.

    Values, shapes and strides stay; padding is 0. New memory for a tensor takes it out of the buffer: another device,
    dtype or memory format, `load_state_dict(assign=True)`, flattening again. `check_views` detects this.
    Raises ValueError for tensors with gaps between their elements, or of several dtypes or devices.
    """
    tensors = list(tensors)
    for tensor in tensors:
        if sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1 > tensor.numel() > 0:
            raise ValueError(f"a tensor of shape {list(tensor.shape)} has gaps: strides {list(tensor.stride())}")
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT)
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"tensors of several dtypes or devices: {sorted(map(str, kinds))}")
    flat = tensors[0].new_zeros(starts[-1]) if tensors else torch.zeros(0)
    for tensor, start in zip(tensors, starts, strict=False):
        view = flat.as_strided(tensor.shape, tensor.stride(), start)
        view.copy_(tensor)
        tensor.data = view
    return flat


def check_views(tensors: Iterable[torch.Tensor], flat: torch.Tensor) -> None:
    """Raise RuntimeError if any of the tensors is no longer a view of `flat`, the buffer that `flatten` returned."""
    storage = flat.untyped_storage().data_ptr()
    moved = sum(t.untyped_storage().data_ptr() != storage for t in tensors if t.numel())
    if moved:
        raise RuntimeError(
            f"{moved} tensors have left their common buffer, and would no longer be updated: build the step after "
            "moving, casting or assigning parameters and buffers, and only once"
        )


class Buffers:
    """The buffers of modules, such as running statistics, copied and restored without host-device synchronization."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for module in modules:
            for buffer in module.buffers():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        self._flat = [flatten(buffers) for buffers in self._buffers]

    def check(self) -> None:
        """Raise RuntimeError if a buffer has new memory."""
        for buffers, flat in zip(self._buffers, self._flat, strict=True):
            check_views(buffers, flat)

    def snapshot(self) -> list[torch.Tensor]:
        """Return a copy of the values, one tensor for each dtype."""
        return [flat.clone() for flat in self._flat]

    def restore_unless(self, condition: torch.Tensor, snapshot: list[torch.Tensor]) -> None:
        """Restore the snapshot if `condition`, a bool tensor [] on the device, is false."""
        for flat, before in zip(self._flat, snapshot, strict=True):
            torch.where(condition, flat, before, out=flat)

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Restore the snapshot."""
        torch._foreach_copy_(self._flat, snapshot)
