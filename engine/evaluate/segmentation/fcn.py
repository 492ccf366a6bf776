"""The fully convolutional network of MoCo's segmentation (1911.05722, appendix A.5: FCN-16s, 1411.4038).

From the paper: conv5's 3x3 convolutions with dilation 2 and stride 1; two 3x3 convolutions of 256 channels and dilation
6, with BatchNorm and ReLU; a 1x1 convolution. Ours, as the paper does not specify them: initialization (He's; the
classifier from N(0, 0.01)), and bilinear upsampling that places each cell of the maps at its center pixel, which for
crops of 513 pixels equals interpolation with aligned corners. Transformers, which are not in the paper, give the
features of their patches, without dilation.
"""

import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import Self

from methods.encoders import ResNet
from methods.vit import PATCH, VisionTransformer

CHANNELS, DILATION = 256, 6


class Fcn(nn.Module):
    """A backbone and a head: images [B, 3, H, W] of any size to logits [B, C, H, W], float32 or wider.

    A frozen backbone stays in evaluation mode and gets no gradient.
    """

    def __init__(self, backbone: ResNet | VisionTransformer, classes: int, *, frozen: bool, seed: int) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone, frozen
        self.stride = dilate(backbone) if isinstance(backbone, ResNet) else PATCH
        self.head = head(backbone.features, classes, seed)
        backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        centered = isinstance(self.backbone, VisionTransformer)
        if centered:
            images = F.pad(images, (0, -width % PATCH, 0, -height % PATCH))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone.maps(images)
        logits = self.head(maps)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return upsample(logits, self.stride, centered=centered)[..., :height, :width]


def dilate(backbone: ResNet) -> int:
    """Give the last stage's convolutions stride 1, and its 3x3 ones dilation 2; return the stride of the maps."""
    for module in backbone.layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)
    return 4 if isinstance(backbone.maxpool, nn.Identity) else 16


def head(features: int, classes: int, seed: int) -> nn.Sequential:
    """Return the convolutions after the backbone: maps [B, F, h, w] to logits [B, C, h, w]."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for channels in (features, CHANNELS):
            conv = nn.Conv2d(channels, CHANNELS, 3, padding=DILATION, dilation=DILATION, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)]
        classifier = nn.Conv2d(CHANNELS, classes, 1)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers, classifier)


def upsample(maps: torch.Tensor, stride: int, *, centered: bool) -> torch.Tensor:
    """Return maps [B, C, h, w], bilinearly interpolated at every pixel: [B, C, stride h, stride w].

    The center of cell i is pixel stride * i of a ResNet, and the center of the patch of a transformer (`centered`).
    """
    height, width = (stride * cells for cells in maps.shape[2:])
    if centered:
        return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    padded = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    pixels = F.interpolate(padded, (height + 1, width + 1), mode="bilinear", align_corners=True)
    return pixels[..., :height, :width]
