"""ResNets: torchvision's keys and parameter counts, and the forward pass by plain functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from methods.encoders import resnet

PARAMETERS = {  # of torchvision's models without fc
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
    "wide_resnet50_2": 68_883_240 - 2_049_000,
}
DEPTHS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
DEPTHS |= {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
DEPTHS |= {"resnet152": (3, 8, 36, 3), "wide_resnet50_2": (3, 4, 6, 3)}


def torchvision_keys(arch: str) -> list[str]:
    """Return the state-dict keys of torchvision's model in order, without fc."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    convolutions = 2 if arch in ("resnet10", "resnet18", "resnet34") else 3
    keys = ["conv1.weight", *norm("bn1")]
    for stage, depth in enumerate(DEPTHS[arch], start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            for number in range(1, convolutions + 1):
                keys += [f"{prefix}.conv{number}.weight", *norm(f"{prefix}.bn{number}")]
            if block == 0 and (stage > 1 or convolutions == 3):
                keys += [f"{prefix}.downsample.0.weight", *norm(f"{prefix}.downsample.1")]
    return keys


def test_resnet50_keys_equal_torchvisions() -> None:
    keys = Path(__file__).with_name("torchvision_resnet50_keys.txt").read_text().split()
    assert list(resnet("resnet50").state_dict()) == keys


@pytest.mark.parametrize("arch", PARAMETERS)
def test_keys_and_parameter_counts_equal_torchvisions(arch: str) -> None:
    model = resnet(arch)
    assert list(model.state_dict()) == torchvision_keys(arch)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]


@pytest.mark.parametrize(("arch", "features"), [("resnet18", 512), ("resnet50", 2048)])
def test_output_has_features_dimensions(arch: str, features: int) -> None:
    model = resnet(arch, width=0.25)
    assert model.features == features // 4
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, features // 4)


def test_resnet10_has_one_block_a_stage() -> None:
    model = resnet("resnet10")
    assert list(model.state_dict()) == torchvision_keys("resnet10")
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("stem", ["imagenet", "medium", "small"])
def test_forward_equals_plain_functions(stem: str) -> None:
    torch.manual_seed(0)
    model = resnet("resnet18", stem=stem, width=0.25).double().eval()
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            buffer.uniform_(-0.1, 0.1)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert model(x).std() > 0.01  # not dead, or any two models would agree
    assert torch.allclose(model(x), _forward(model.state_dict(), x, stem), atol=1e-12, rtol=0)


def _forward(w: dict[str, torch.Tensor], x: torch.Tensor, stem: str) -> torch.Tensor:
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        return (x - w[f"{name}.running_mean"].view(shape)) * scale.view(shape) + w[f"{name}.bias"].view(shape)

    if stem == "small":
        x = norm(F.conv2d(x, w["conv1.weight"], padding=1), "bn1").relu()
    elif stem == "medium":
        x = norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=2), "bn1").relu()
    else:
        x = norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), "bn1").relu()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage in range(1, 5):
        for block in range(2):
            p, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, w[f"{p}.conv1.weight"], stride=stride, padding=1), f"{p}.bn1").relu()
            y = norm(F.conv2d(y, w[f"{p}.conv2.weight"], padding=1), f"{p}.bn2")
            if f"{p}.downsample.0.weight" in w:
                x = norm(F.conv2d(x, w[f"{p}.downsample.0.weight"], stride=stride), f"{p}.downsample.1")
            x = (x + y).relu()
    return x.mean(dim=(2, 3))


def test_convolutions_are_initialized_as_torchvisions() -> None:
    """He initialization by fan-out: the standard deviation is sqrt(2 / (out channels * kernel area))."""
    weight = resnet("resnet50").layer2[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    strided = resnet("resnet50").layer2[0].conv1.weight  # 256 to 128 channels: fan-in and fan-out differ
    assert strided.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.03)


def test_zero_init_residual_starts_blocks_as_the_identity() -> None:
    for arch in ("resnet18", "resnet50"):
        block = resnet(arch, width=0.125, zero_init_residual=True).layer1[1]
        x = torch.randn(4, block.conv1.in_channels, 8, 8).relu()
        assert torch.equal(block(x), x)
        assert not torch.equal(resnet(arch, width=0.125).layer1[1](x), x)
