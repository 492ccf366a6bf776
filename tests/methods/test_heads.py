"""Projectors and predictors, layer by layer as published, and the encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.base import Base
from methods.encoders import resnet
from methods.heads import Encoder
from methods.registry import BASES

R50, VIT = 2048, 384


def layers_of(module: nn.Module | None) -> list[str]:
    """Return a head's layers: `a-b` linear, `+` with bias, `BN`, `BN/scale`, `BN/plain`, `relu`."""
    layers = []
    for layer in module.modules() if module is not None else []:
        if isinstance(layer, nn.Linear):
            layers.append(f"{layer.in_features}-{layer.out_features}{'+' if layer.bias is not None else ''}")
        elif isinstance(layer, nn.BatchNorm1d):
            kind = "/plain" if not layer.affine else "" if layer.bias.requires_grad else "/scale"
            layers.append(f"BN{kind}")
        elif isinstance(layer, nn.ReLU):
            layers.append("relu")
    return layers


PUBLISHED = {
    ("moco_v1", False): (["2048-128+"], []),
    ("moco_v2", False): (["2048-2048+", "relu", "2048-128+"], []),
    ("moco_v3", False): (
        ["2048-4096", "BN", "relu", "4096-256", "BN/plain"],
        ["256-4096", "BN", "relu", "4096-256"],
    ),
    ("moco_v3", True): (
        ["384-4096", "BN", "relu", "4096-4096", "BN", "relu", "4096-256", "BN/plain"],
        ["256-4096", "BN", "relu", "4096-256", "BN/plain"],
    ),
    ("simclr", False): (["2048-2048", "BN", "relu", "2048-128", "BN/scale"], []),
    ("byol", False): (["2048-4096+", "BN", "relu", "4096-256"], ["256-4096+", "BN", "relu", "4096-256"]),
}


@pytest.mark.parametrize(("name", "transformer"), PUBLISHED)
def test_layers_are_as_published(name: str, transformer: bool) -> None:
    base: Base = BASES[name]
    heads = base.heads(VIT if transformer else R50, None, base.published["model.dim"], nn.BatchNorm1d, transformer)
    assert tuple(map(layers_of, heads)) == PUBLISHED[name, transformer]


def test_mlp_dim_sets_the_hidden_width() -> None:
    projector, predictor = BASES["byol"].heads(64, 32, 8, nn.BatchNorm1d, False)
    assert layers_of(projector) == ["64-32+", "BN", "relu", "32-8"]
    assert layers_of(predictor) == ["8-32+", "BN", "relu", "32-8"]


def encoder(name: str) -> Encoder:
    torch.manual_seed(0)
    base = BASES[name]
    backbone = resnet("resnet18", stem="small", width=0.125)
    return Encoder(backbone, *base.heads(backbone.features, 32, 16, nn.BatchNorm1d, False), joint=base.joint)


@pytest.mark.parametrize("name", ["moco_v2", "byol"])
def test_each_view_is_its_own_batch_with_embeddings_of_norm_one(name: str) -> None:
    model = encoder(name)
    a, b = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    together = model(a, b)
    assert torch.equal(together[0], model(a)[0])
    assert torch.equal(together[1], model(b)[0])
    assert torch.allclose(together[0].norm(dim=1), torch.ones(4), atol=1e-6)


def test_simclr_views_are_one_batch() -> None:
    model = encoder("simclr")
    a, b = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    together = torch.cat(model(a, b))
    assert torch.equal(together, model(torch.cat([a, b]))[0])
    assert not torch.allclose(together[:4], model(a)[0], atol=1e-3)
