"""Two encoders in lockstep against one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods.encoders import ResNet, resnet
from methods.heads import Encoder, byol_heads
from methods.lockstep import forward, in_lockstep
from methods.norm import BatchNorm, norm_layers
from methods.vit import VisionTransformer
from tests.methods.test_norm import Copies


def encoder(predictor: bool, arch: str) -> Encoder:
    torch.manual_seed(0)
    norm = norm_layers("sync")
    backbone: ResNet | VisionTransformer
    if arch == "resnet18":
        backbone = resnet(arch, stem="small", width=0.125, norm=norm)
    else:
        backbone = VisionTransformer(32, 2, 4, size=16, conv_stem=True, norm=norm)
    projector, head = byol_heads(backbone.features, 24, 16, norm, False)
    return Encoder(backbone, projector, head if predictor else None).double()


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.state_dict().values(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("world", "arch"), [(1, "resnet18"), (3, "resnet18"), (3, "transformer")])
def test_encoders_in_lockstep_compute_what_each_computes_alone(world: int, arch: str) -> None:
    """Embeddings, gradients and running statistics, bit for bit, in one gather a layer."""
    online, momentum = encoder(True, arch), encoder(False, arch)
    size = 8 if arch == "resnet18" else 16
    rows: list[int] = []
    ranks = Copies(world)
    for module in (*online.modules(), *momentum.modules()):
        if isinstance(module, BatchNorm):
            module.ranks = ranks
    alone = copy.deepcopy((online, momentum))
    views = [torch.randn(4, 3, size, size, dtype=torch.float64) for _ in range(3)]

    def gather(local: torch.Tensor) -> torch.Tensor:
        rows.append(local.numel())
        return ranks.gather(local)

    q, k = in_lockstep([forward(online, *views[:2]), forward(momentum, *views[2:])], gather, (True, False))
    with torch.no_grad():
        expected_k = alone[1](*views[2:])
    expected_q = alone[0](*views[:2])
    assert all(torch.equal(*pair) for pair in zip((*q, *k), (*expected_q, *expected_k), strict=True))
    assert [t.requires_grad for t in (*q, *k)] == [True, True, False]
    for outputs in (q, expected_q):
        torch.stack([(output[:, 0] - output[:, 1]).square().sum() for output in outputs]).sum().backward()
    for one, other in zip((online, momentum), alone, strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors(one), tensors(other), strict=True))
    assert len(rows) == sum(isinstance(module, BatchNorm) for module in online.modules())
