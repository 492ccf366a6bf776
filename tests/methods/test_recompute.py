"""Blocks that are computed again in the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from methods.encoders import resnet
from methods.norm import norm_layers
from methods.recompute import recompute
from methods.vit import vit


def backbones() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    split, _ = norm_layers("split", 2)
    return {
        "resnet18": resnet("resnet18", stem="small", width=0.125).double(),
        "resnet50, split": resnet("resnet50", stem="small", width=0.125, norm=split).double(),
        "vit": vit("vit_small", size=32).double(),
    }


def kept_and_gradients(backbone: nn.Module) -> tuple[int, list[torch.Tensor]]:
    """Return the bytes kept for the backward pass, and output, gradients and buffers."""
    kept: dict[int, Any] = {}
    own = {p.data_ptr() for p in backbone.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = backbone(x)
    size = sum(storage.nbytes() for storage in kept.values())
    found.square().sum().backward()
    return size, [found.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None), *backbone.buffers()]


@pytest.mark.parametrize("name", backbones())
def test_gradients_and_statistics_are_the_same_from_less_memory(name: str) -> None:
    plain = backbones()[name]
    again = copy.deepcopy(plain)
    recompute(again)
    (plain_kept, expected), (kept, found) = kept_and_gradients(plain), kept_and_gradients(again)
    assert kept < 0.4 * plain_kept
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-13, rtol=1e-12) for a, b in zip(found, expected, strict=True))
    norms = [m for m in again.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all((m.momentum, m.num_batches_tracked.item()) == (0.1, 1) for m in norms)


def test_nothing_is_computed_again_without_gradient_or_where_it_is_not_asked_for() -> None:
    asked = backbones()["resnet18"]
    recompute(asked)
    calls = list[int]()
    asked.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index,union-attr]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        asked(x)
    assert len(calls) == 1
    asked(x).sum().backward()
    assert len(calls) == 3
