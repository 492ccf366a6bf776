"""The segmentation network by hand: upsampling, dilation, transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from engine.evaluate.segmentation.fcn import Fcn, upsample
from engine.weights.load import digest
from methods.encoders import resnet
from methods.vit import VisionTransformer


def test_cells_are_upsampled_to_their_pixels() -> None:
    ramp = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 3)
    rows = upsample(16 * ramp, 16, centered=False)[0, 0, :, 0]
    assert torch.allclose(rows[:65], torch.arange(65.0), atol=1e-4)  # a ResNet's cell i is centered on pixel 16 i
    rows = upsample(16 * ramp, 16, centered=True)[0, 0, :, 0]
    assert torch.allclose(rows[8:72], torch.arange(8.0, 72) - 7.5, atol=1e-4)  # a patch's, on its middle
    maps = torch.randn(1, 2, 33, 33)
    expected = F.interpolate(maps, (513, 513), mode="bilinear", align_corners=True)
    assert torch.allclose(upsample(maps, 16, centered=False)[..., :513, :513], expected, atol=1e-4)


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 16), ("small", 4)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_last_stage_is_dilated(arch: str, stem: Any, stride: int) -> None:
    """Its first block by hand: 3x3 convolutions of dilation 2, none of stride 2; each cell is centered on its pixel."""
    backbone = resnet(arch, stem=stem, width=0.25).eval()
    before = digest(backbone)
    model = Fcn(backbone, 3, frozen=True, seed=0).eval()
    assert model.stride == stride
    assert digest(backbone) == before
    x, block = torch.randn(2, backbone.layer4[0].conv1.in_channels, 6, 5), backbone.layer4[0]

    def conv(x: torch.Tensor, layer: torch.nn.Conv2d) -> torch.Tensor:
        wide = layer.weight.shape[-1] == 3
        return F.conv2d(x, layer.weight, padding=2 * wide, dilation=1 + wide)

    y = block.bn1(conv(x, block.conv1)).relu()
    y = block.bn2(conv(y, block.conv2))
    if arch == "resnet50":
        y = block.bn3(conv(y.relu(), block.conv3))
    shortcut = block.downsample[1](conv(x, block.downsample[0]))
    assert torch.allclose(block(x), (y + shortcut).relu(), atol=1e-5)
    image = torch.zeros(1, 3, 6 * stride + 1, 4 * stride + 3)
    assert backbone.maps(image).shape[2:] == (7, 5)
    assert model(image).shape == (1, 3, 6 * stride + 1, 4 * stride + 3)


def test_transformers_give_their_patches_features_at_any_size() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(192, 2, 3, size=64, stop_grad_conv1=False).eval()
    tokens: list[torch.Tensor] = []
    vit.norm.register_forward_hook(lambda module, args, out: tokens.append(out))
    images = torch.randn(2, 3, 64, 64)
    class_token, maps = vit(images), vit.maps(images)
    assert torch.equal(class_token, tokens[0][:, 0])
    assert torch.allclose(maps[:, :, 1, 2], tokens[0][:, 1 + 4 + 2], atol=1e-6)
    model = Fcn(vit, 5, frozen=True, seed=0).eval()
    assert model(torch.randn(1, 3, 83, 50)).shape == (1, 5, 83, 50)
    larger = vit.maps(F.interpolate(images, (128, 128)))
    assert larger.shape == (2, 192, 8, 8)
