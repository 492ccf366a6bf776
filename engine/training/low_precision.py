"""Weights in low precision, cast once a step in one operation, instead of autocast's cast of each in every pass."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_CAST = (nn.Conv2d, nn.Linear)  # the layers that autocast computes in low precision


class LowPrecisionWeights:
    """Copies of a module's weights and biases of convolutions and linear layers, in `dtype`.

    They take the parameters' places in the context `applied`; autocast then finds nothing to cast. Gradients arrive at
    the copies, `leaves`, in their dtype, as autocast's casts would pass them on.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        named = [
            (layer, name, p)
            for layer in module.modules()
            if isinstance(layer, _CAST)
            for name, p in layer.named_parameters(recurse=False)
        ]
        self._places = [(layer._parameters, name) for layer, name, _ in named]
        self._parameters: list[torch.Tensor] = [p for _, _, p in named]
        self._copies = [torch.empty_like(p, dtype=dtype, requires_grad=p.requires_grad) for p in self._parameters]
        self.leaves = {p: copy for (_, _, p), copy in zip(named, self._copies, strict=True) if p.requires_grad}
        """The copy of each trained parameter."""

    @torch.no_grad()
    def update(self) -> None:
        """Cast the parameters."""
        torch._foreach_copy_(self._copies, self._parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Use the copies in the forward passes of this context."""
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(self._parameters)

    def _put(self, tensors: list) -> None:
        for (parameters, name), tensor in zip(self._places, tensors, strict=True):
            parameters[name] = tensor  # a plain tensor too: `setattr` takes only parameters
