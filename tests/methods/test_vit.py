"""Vision transformers: timm's keys, and moco-v3's initialization and forward pass by plain functions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from methods.vit import sine_cosine_positions, vit

SIZES = [("vit_tiny", 192, 5_524_416), ("vit_small", 384, 21_665_664), ("vit_base", 768, 85_798_656)]


@pytest.mark.parametrize(("arch", "dim", "count"), SIZES)
def test_keys_and_parameter_counts_equal_timms(arch: str, dim: int, count: int) -> None:
    model = vit(arch)
    assert list(model.state_dict()) == Path(__file__).with_name("timm_vit_keys.txt").read_text().split()
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == count  # timm's, including positions
    assert model.features == dim


def test_the_large_ones_size_is_timms() -> None:
    with torch.device("meta"):  # takes no memory
        model = vit("vit_large", stop_grad_conv1=False)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 303_301_632
    assert {len(model.blocks), model.blocks[0].attn.heads, model.features} == {24, 16, 1024}  # type: ignore[union-attr]


def test_convolutional_stem_equals_plain_functions() -> None:
    """Four 3x3 convolutions of stride 2 with BatchNorm and ReLU, then 1x1 (moco-v3, `vits.py`); one block less."""
    torch.manual_seed(0)
    model = vit("vit_conv_small", size=32)
    assert (len(model.blocks), model.blocks[0].attn.heads) == (11, 12)  # type: ignore[union-attr]
    assert all(parameter.requires_grad for parameter in model.parameters())  # never frozen
    x, w = torch.randn(3, 3, 32, 32), model.state_dict()
    tokens = x
    for layer, channels in zip(range(0, 12, 3), (48, 96, 192, 384), strict=True):
        tokens = F.conv2d(tokens, w[f"patch_embed.proj.{layer}.weight"], stride=2, padding=1)
        assert tokens.shape[1] == channels
        norm = f"patch_embed.proj.{layer + 1}"
        tokens = F.batch_norm(tokens, None, None, w[f"{norm}.weight"], w[f"{norm}.bias"], training=True).relu()
    tokens = F.conv2d(tokens, w["patch_embed.proj.12.weight"], w["patch_embed.proj.12.bias"])
    assert torch.allclose(model.patch_embed(x), tokens.flatten(2).transpose(1, 2), atol=1e-5)
    assert model(x).shape == (3, 384)


def test_forward_equals_plain_functions() -> None:
    torch.manual_seed(0)
    model = vit("vit_small", size=32).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0.5, 0.2)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    w = model.state_dict()

    def norm(t: torch.Tensor, name: str) -> torch.Tensor:
        centered = t - t.mean(-1, keepdim=True)
        return (
            centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def linear(t: torch.Tensor, name: str) -> torch.Tensor:
        return t @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(2, 4, -1)
    tokens = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    t = torch.cat([w["cls_token"].expand(2, 1, -1), tokens], 1) + w["pos_embed"]
    for block in range(12):
        q, k, v = linear(norm(t, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv").split(384, dim=-1)
        heads = []
        for head in range(12):
            part = slice(32 * head, 32 * head + 32)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(32)).softmax(-1)
            heads.append(weights @ v[..., part])
        t = t + linear(torch.cat(heads, -1), f"blocks.{block}.attn.proj")
        hidden = linear(norm(t, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1")
        t = t + linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), f"blocks.{block}.mlp.fc2")
    expected = norm(t, "norm")[:, 0]
    assert expected.std() > 0.1
    assert torch.allclose(model(x), expected, atol=1e-10, rtol=0)


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    positions = sine_cosine_positions(3, 16)[0]
    assert positions[0].abs().sum() == 0
    for row in range(3):
        for column in range(3):
            expected = []
            for coordinate in (row, column):
                angles = [coordinate / 10000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert positions[1 + 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_stop_grad_conv1_freezes_the_patch_projection_alone() -> None:
    assert [n for n, p in vit("vit_small", size=32).named_parameters() if not p.requires_grad] == [
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    assert all(p.requires_grad for p in vit("vit_small", size=32, stop_grad_conv1=False).parameters())


def test_initialization_is_moco_v3s() -> None:
    torch.manual_seed(0)
    model = vit("vit_small", size=32)
    attention = model.blocks[0].attn
    for weight, bound in (
        (attention.qkv.weight, math.sqrt(6 / (384 + 384))),  # query, key and value separately
        (attention.proj.weight, math.sqrt(6 / (384 + 384))),
        (model.blocks[0].mlp.fc1.weight, math.sqrt(6 / (384 + 1536))),
        (model.patch_embed.proj.weight, math.sqrt(6 / (3 * 256 + 384))),
    ):
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert attention.qkv.bias.abs().sum() == 0
    assert 0 < model.cls_token.abs().max() < 1e-5


def test_size_must_be_a_multiple_of_the_patch() -> None:
    with pytest.raises(ValueError, match="choose a multiple of 16"):
        vit("vit_small", size=40)


def test_every_patch_gets_gradient() -> None:
    torch.manual_seed(0)
    model = vit("vit_small", size=32).eval()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad is not None
    assert (F.avg_pool2d(x.grad.abs(), 16) > 0).all()
