"""The detector's parts, if torchvision is installed."""

from __future__ import annotations

import torch

from engine.weights.architecture import Architecture
from methods.encoders import ResNet
from tests.torchvision_operators import torchvision_or_skip


def test_the_detector_uses_the_encoders_stages_as_torchvisions_resnet_does() -> None:
    torchvision = torchvision_or_skip()
    from engine.evaluate.detection.faster_rcnn import faster_rcnn

    torch.manual_seed(0)
    backbone = Architecture("resnet50").build().eval()
    assert isinstance(backbone, ResNet)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = faster_rcnn(backbone, 20, (480, 800), 1333).eval()
    names = {id(value): name for name, value in backbone.named_parameters()}
    assert {id(value) for value in model.parameters()} >= names.keys()  # the entire encoder
    new = [name for name, value in model.named_parameters() if id(value) not in names]
    assert {name.split(".")[0] for name in new} == {"rpn", "roi_heads"}
    reference = torchvision.models.resnet50()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(state, strict=True)
    reference.eval()
    images = torch.randn(1, 3, 96, 64)
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
    maps = reference.layer3(reference.layer2(reference.layer1(x)))
    assert torch.allclose(model.backbone(images), maps, atol=1e-4)
    regions = torch.randn(3, 1024, 14, 14)
    head = model.roi_heads.box_head
    torch.nn.init.normal_(head.norm.weight)
    assert torch.allclose(head(regions), head.norm(reference.layer4(regions)).mean(dim=(2, 3)), atol=1e-4)
    assert model.roi_heads.box_predictor.cls_score.out_features == 21


def test_regions_are_pooled_at_their_place() -> None:
    torchvision_or_skip()
    from engine.evaluate.detection.faster_rcnn import Pool

    columns = (16 * torch.arange(8.0) + 8).expand(1, 1, 8, 8)  # pixel columns at the centers of the cells
    boxes = [torch.tensor([[16.0, 16.0, 96.0, 96.0]])]
    pooled = Pool(16)({"0": columns}, boxes, [(128, 128)])
    centers = 16 + (torch.arange(14) + 0.5) * 80 / 14
    assert torch.allclose(pooled[0, 0, 5], centers, atol=1e-3)
