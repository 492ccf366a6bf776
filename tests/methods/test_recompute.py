"""Activation checkpointing of backbone blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from methods.encoders import resnet
from methods.norm import BatchNorm, norm_layers
from methods.recompute import recompute
from methods.vit import vit


def backbones() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    split = norm_layers("split", 2)
    return {
        "resnet18": resnet("resnet18", stem="small", width=0.125).double(),
        "resnet50, split": resnet("resnet50", stem="small", width=0.125, norm=split).double(),
        "vit": vit("vit_small", size=32).double(),
    }


def saved_bytes_and_results(backbone: nn.Module) -> tuple[int, list[torch.Tensor]]:
    """Return the bytes saved for the backward pass, and output, gradients and buffers."""
    saved: dict[int, Any] = {}
    parameters = {p.data_ptr() for p in backbone.parameters()}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = backbone(x)
    size = sum(storage.nbytes() for storage in saved.values())
    output.square().sum().backward()
    return size, [output.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None), *backbone.buffers()]


@pytest.mark.parametrize("name", backbones())
def test_recomputing_saves_memory_and_changes_no_result(name: str) -> None:
    plain = backbones()[name]
    recomputing = copy.deepcopy(plain)
    recompute(recomputing)
    plain_bytes, expected = saved_bytes_and_results(plain)
    recomputing_bytes, results = saved_bytes_and_results(recomputing)
    assert recomputing_bytes < 0.4 * plain_bytes
    assert all(torch.allclose(a, b, atol=1e-13, rtol=1e-12) for a, b in zip(results, expected, strict=True))
    norms = [m for m in recomputing.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    counted = [m.num_batches_tracked.item() == (not isinstance(m, BatchNorm)) for m in norms]
    assert all(counted)
    assert all(m.momentum == 0.1 for m in norms)


def test_blocks_recompute_only_with_gradient() -> None:
    backbone = backbones()["resnet18"]
    recompute(backbone)
    calls = list[int]()
    backbone.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index,union-attr]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        backbone(x)
    assert len(calls) == 1
    backbone(x).sum().backward()
    assert len(calls) == 3
