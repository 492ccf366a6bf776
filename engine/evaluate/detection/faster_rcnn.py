"""Faster R-CNN with a ResNet's C4 backbone (1506.01497; 1911.05722, appendix A.1), built from torchvision's parts.

The paper's R50-C4, which torchvision lacks: proposals and pooling use the maps of conv1 to conv4, of stride 16; conv5
is the head of each region of 14 x 14 cells, followed by a BatchNorm. All pretrained stages are used, and only
that BatchNorm and the predictors are new, so that the result shows the encoder; a feature pyramid would add random
layers. Numbers of proposals and regions are those of detectron2's C4, MoCo's detector. Its box losses are absolute,
torchvision's are smooth (below 1/9); annotations and scores are VOC's in both.
"""

from typing import Any

import torch
from torch import nn

from methods.encoders import ResNet
from pipeline.augment.color import IMAGENET, Statistics
from pipeline.system.errors import InputError

ANCHORS = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
_CELLS = 14


class C4(nn.Module):
    """Stem to third stage: images [B, 3, H, W] to maps [B, C, H / 16, W / 16] (small stem: H / 4, W / 4)."""

    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
        self.stages = nn.Sequential(backbone.layer1, backbone.layer2, backbone.layer3)
        self.out_channels = backbone.layer4[0].conv1.in_channels  # type: ignore[union-attr]
        self.stride = 4 if isinstance(backbone.maxpool, nn.Identity) else 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(images))


class Res5(nn.Module):
    """Last stage, BatchNorm and mean: regions [R, C, 14, 14] to features [R, F]."""

    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.stage, self.norm = backbone.layer4, nn.BatchNorm2d(backbone.features)

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stage(regions)).mean(dim=(2, 3))


class Pool(nn.Module):
    """Pooling of regions, aligned as in detectron2; that of torchvision's detectors is half a pixel off."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(
        self, features: dict[str, torch.Tensor], proposals: list[torch.Tensor], shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        from torchvision.ops import roi_align

        return roi_align(features["0"], proposals, _CELLS, 1 / self.stride, sampling_ratio=0, aligned=True)


def faster_rcnn(
    backbone: ResNet, classes: int, sizes: tuple[int, ...], largest: int, statistics: Statistics = IMAGENET
) -> nn.Module:
    """Return the detector, all of it trainable. In training it maps images and boxes to losses, else images to boxes.

    Images are [3, H, W] from 0 to 1. classes: without the background. sizes: shorter sides of training images, one of
    them drawn at random; of test images the last. largest: maximum of the longer side.
    """
    detection = torchvision().models.detection
    body, (mean, std) = C4(backbone), statistics
    model = detection.FasterRCNN(
        body,
        min_size=sizes,
        max_size=largest,
        image_mean=list(mean),
        image_std=list(std),
        rpn_anchor_generator=detection.rpn.AnchorGenerator((ANCHORS,), (RATIOS,)),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        rpn_post_nms_top_n_train=2000,
        rpn_post_nms_top_n_test=1000,
        box_roi_pool=torchvision().ops.MultiScaleRoIAlign(["0"], _CELLS, 0),
        box_head=Res5(backbone),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(backbone.features, classes + 1),
    )
    model.roi_heads.box_roi_pool = Pool(body.stride)  # the constructor refuses it
    return model.requires_grad_(True)


def torchvision() -> Any:
    """Return the library. Raises InputError if it is not installed, or built for another torch."""
    try:
        import torchvision
        import torchvision.models.detection
    except ImportError as error:
        raise InputError(f"{error.name} is not installed, and detection needs it: pip install torchvision") from None
    except RuntimeError as error:  # its compiled operators were built for another torch
        raise InputError(
            f"torchvision does not load ({error}): install the one for torch {torch.__version__}, from torch's index"
        ) from None
    return torchvision
