"""ResNets (1512.03385) with torchvision's key names, for ImageNet or, by their stem, for images of 32 to 128 pixels.

State dicts load into torchvision's models and back, except for `fc`, which a pretrained backbone lacks.
"""

from typing import Any, Literal, TypeVar

import torch
from torch import nn

from methods.norm import Norm
from methods.recompute import Recomputable

Stem = Literal["imagenet", "medium", "small"]
STEMS: dict[Stem, tuple[int, int]] = {"imagenet": (7, 2), "medium": (5, 2), "small": (3, 1)}
"""Kernel and stride of the first convolution; state dicts show a stem by its kernel alone."""


def _conv(n_in: int, n_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False)


class _Block(Recomputable):
    """A residual block: relu(residual(x) + shortcut(x))."""

    downsample: nn.Module | None
    relu: nn.Module

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.residual(x) + shortcut)


class BasicBlock(_Block):
    """Two 3x3 convolutions (ResNet-10, 18 and 34)."""

    expansion = 1

    def __init__(self, n_in: int, width: int, stride: int, downsample: nn.Module | None, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(n_in, width, 3, stride), norm(width)
        self.conv2, self.bn2 = _conv(width, width, 3), norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Bottleneck(_Block):
    """1x1, 3x3 (with the stride, as in torchvision), 1x1 to four times the width (ResNet-50, 101 and 152)."""

    expansion = 4
    widening = 1
    """Factor on the channels of the first two convolutions."""

    def __init__(self, n_in: int, width: int, stride: int, downsample: nn.Module | None, norm: Norm) -> None:
        super().__init__()
        inner, n_out = width * self.widening, width * self.expansion
        self.conv1, self.bn1 = _conv(n_in, inner, 1), norm(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride), norm(inner)
        self.conv3, self.bn3 = _conv(inner, n_out, 1), norm(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class WideBottleneck(Bottleneck):
    """A bottleneck of twice the inner channels (Wide ResNet-50-2, 1605.07146)."""

    widening = 2


BlockType = type[BasicBlock] | type[Bottleneck]


class Mean(nn.Module):
    """Global average pooling, [B, C, H, W] to [B, C], with a channels-last gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)


def base_channels(width: float) -> int:
    """Return the channels of a ResNet's first layer; the other layers have multiples of them."""
    return max(8, int(64 * width))


class ResNet(nn.Module):
    """A ResNet without its classifier: images [B, 3, H, W] to features [B, `features`].

    stem: `imagenet` (7x7, stride 2, max-pooling), `medium` (5x5, stride 2) or `small` (3x3).
    width: factor on the published channel counts (0.25: 16 to 128 channels for basic blocks).
    zero_init_residual: each block's last BatchNorm starts at scale 0, the block as the identity (1706.02677, 5.1).
    """

    transformer = False

    def __init__(
        self,
        block: BlockType,
        depths: tuple[int, int, int, int],
        *,
        stem: Stem = "imagenet",
        width: float = 1.0,
        norm: Norm = nn.BatchNorm2d,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        base = base_channels(width)
        self.conv1 = _conv(3, base, *STEMS[stem])
        self.bn1 = norm(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        self._channels = base
        self.layer1 = self._stage(block, base, depths[0], 1, norm)
        self.layer2 = self._stage(block, 2 * base, depths[1], 2, norm)
        self.layer3 = self._stage(block, 4 * base, depths[2], 2, norm)
        self.layer4 = self._stage(block, 8 * base, depths[3], 2, norm)
        self.avgpool = Mean()
        self.features = self._channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight)

    def _stage(self, block: BlockType, width: int, depth: int, stride: int, norm: Norm) -> nn.Sequential:
        blocks = []
        for index in range(depth):
            block_stride, n_out = stride if index == 0 else 1, width * block.expansion
            downsample = None
            if block_stride != 1 or self._channels != n_out:
                downsample = nn.Sequential(_conv(self._channels, n_out, 1, block_stride), norm(n_out))
            blocks.append(block(self._channels, width, block_stride, downsample, norm))
            self._channels = n_out
        return nn.Sequential(*blocks)

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature maps, before pooling: [B, `features`, h, w]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.avgpool(self.maps(x))


RESNETS: dict[str, tuple[BlockType, tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "wide_resnet50_2": (WideBottleneck, (3, 4, 6, 3)),
}


def resnet(arch: str, **options: Any) -> ResNet:
    """Return one of `RESNETS`, initialized as torchvision's; options of `ResNet`."""
    return ResNet(*RESNETS[arch], **options)


M = TypeVar("M", bound=nn.Module)


def place(module: M, device: torch.device) -> M:
    """Move `module` to the device, with channels-last convolution weights, and return it."""
    return module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
