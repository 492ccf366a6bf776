"""Detection: average precision against a loop and by hand, the detector's parts, training on drawn boxes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.evaluate import trainer
from engine.evaluate.__main__ import run
from engine.evaluate.detection import detect
from engine.evaluate.detection.voc_ap import THRESHOLDS, Boxes, Metric, average_precision, precision
from engine.weights.load import Architecture
from methods.encoders import ResNet, resnet
from methods.vit import VisionTransformer
from pipeline.dense.scenes import write
from pipeline.dense.voc_boxes import open_boxed
from pipeline.sources.synthetic import CLASSES
from pipeline.system.errors import InputError
from tests.torchvision_operators import torchvision_or_skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in VOC's layout, 12 for training and 6 for testing."""
    folder = tmp_path_factory.mktemp("scenes") / "voc"
    write(folder, 12, 6, size=64)
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small random encoder, as a state dict."""
    torch.manual_seed(0)
    torch.save(resnet("resnet18", width=0.25).state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


# Average precision


def _problem(seed: int) -> tuple[Boxes, Boxes]:
    """Objects in eight images, some difficult, and detections: near them, twice of some, and elsewhere."""
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (40, 2))
    boxes = np.concatenate([corner, corner + random.uniform(10, 40, (40, 2))], axis=1)
    images = random.integers(0, 8, 40)
    true = Boxes(images, boxes, random.random(40) < 0.2)
    near = np.repeat(np.arange(40), random.integers(0, 3, 40))
    moved = boxes[near] + random.normal(0, 3, (len(near), 4))
    corner = random.uniform(0, 80, (25, 2))
    others = np.concatenate([corner, corner + 15], axis=1)
    found = Boxes(
        np.concatenate([images[near], random.integers(0, 9, 25)]),
        np.concatenate([moved, others]),
        random.random(len(near) + 25),
    )
    return found, true


def _by_loop(found: Boxes, true: Boxes, threshold: float, metric: Metric) -> float:
    """As VOC's development kit describes it, a detection at a time."""
    claimed, hits, misses, points = set(), 0, 0, []
    objects = sum(not difficult for difficult in true.marks)
    for d in sorted(range(len(found.images)), key=lambda d: -found.marks[d]):
        best, at = 0.0, -1
        for t in range(len(true.images)):
            if true.images[t] != found.images[d]:
                continue
            a, b = found.boxes[d], true.boxes[t]
            wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            both = max(wide, 0) * max(high, 0)
            iou = both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
            if iou > best:
                best, at = iou, t
        if best > threshold and true.marks[at]:
            continue
        if best > threshold and at not in claimed:
            claimed.add(at)
            hits += 1
        else:
            misses += 1
        points.append((hits / objects, hits / (hits + misses)))
    if metric == "voc07":
        return sum(max([p for r, p in points if r >= t / 10 - 1e-12], default=0.0) for t in range(11)) / 11
    area, before = 0.0, 0.0
    for number, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[number:])
        before = recall
    return area


@pytest.mark.parametrize("metric", ["voc07", "area"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_the_development_kits(seed: int, metric: Metric) -> None:
    found, true = _problem(seed)
    values = [average_precision(found, true, threshold, metric) for threshold in THRESHOLDS]
    assert values == pytest.approx([_by_loop(found, true, threshold, metric) for threshold in THRESHOLDS])
    assert 0.1 < values[0] < 1
    assert values[-1] < values[0]


def test_the_area_is_scikit_learns_where_precision_falls() -> None:
    """One object an image, and detections that are on it or far off; the gaps between the right ones grow."""
    metrics = pytest.importorskip("sklearn.metrics")
    right = np.isin(np.arange(30), [0, 1, 3, 6, 10, 15, 21, 28])
    scores, box = np.linspace(1, 0, 30), np.array([[0.0, 0, 10, 10]])
    images = np.where(right, np.cumsum(right) - 1, 99)
    found = Boxes(images, np.where(right[:, None], box, box + 50), scores)
    true = Boxes(np.arange(8), np.repeat(box, 8, axis=0), np.zeros(8, bool))
    expected = metrics.average_precision_score(right, scores)
    assert expected < 0.7
    assert average_precision(found, true, 0.5, "area") == pytest.approx(expected)


def test_scores_are_means_over_classes_that_have_objects() -> None:
    one, none = _problem(0), (Boxes(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0)),) * 2
    missed = (none[0], _problem(1)[1])
    only_difficult = (_problem(2)[0], Boxes(np.zeros(1, int), np.array([[0.0, 0, 9, 9]]), np.ones(1, bool)))
    scores = precision(*map(list, zip(one, missed, only_difficult, strict=True)), ("a", "b", "c"), "voc07")
    assert set(scores.per_class) == {"a", "b"}
    assert scores.per_class["b"] == 0
    assert scores.ap50 == pytest.approx(average_precision(*one, 0.5, "voc07") / 2)
    assert scores.ap75 == pytest.approx(average_precision(*one, 0.75, "voc07") / 2)
    assert scores.ap == pytest.approx(np.mean([average_precision(*one, at, "voc07") for at in THRESHOLDS]) / 2)


# Rates, data, options


def test_rates_are_the_recipes() -> None:
    at = [0, 50, 100, 17999, 18000, 21999, 22000]
    expected = [2e-5, 0.02 * 0.5005, 0.02, 0.02, 2e-3, 2e-3, 2e-4]
    assert [detect.rate(0.02, step, 24000) for step in at] == pytest.approx(expected)


def test_mirrored_boxes_are_those_of_the_mirrored_image(drawn: Path) -> None:
    data = open_boxed([(drawn, "trainval")])
    assert set(data.classes) == set(CLASSES)
    for index in range(len(data)):
        image, objects = data.read(index), data.objects[index]
        mirrored, moved = detect._flipped(data, index, True)
        for box, other in zip(objects.boxes.astype(int), moved.boxes.astype(int), strict=True):
            inside = image[box[1] : box[3], box[0] : box[2]]
            assert (mirrored[other[1] : other[3], other[0] : other[2]] == inside[:, ::-1]).all()


def evaluate(encoder: Path, drawn: Path, *more: str) -> Path:
    """Detect, and return where the result stands."""
    out = encoder.parent / "out"
    options = ["--train", str(drawn), "--test", str(drawn), "--sizes", "96", "--largest", "96", "--batch", "4"]
    run(["detect", str(encoder), *options, "--cpu", "--workers", "1", "--out", str(out), *more])
    return out / "detect.json"


def test_without_torchvision_a_line_says_so(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match="torchvision is not installed, which detection wants: pip install"):
        evaluate(encoder, drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", "0"], "--iterations 0"),
        (["--sizes", "16", "96"], "--sizes 16 to 96: choose 32 to --largest 96"),
        (["--train", "nowhere:trainval"], r"nowhere/ImageSets/Main/trainval.txt: cannot be read"),
        (["--test-set"], "unrecognized"),
    ],
)
def test_options_that_cannot_work_are_refused(
    options: list[str], message: str, encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(detect, "torchvision", lambda: None)
    with pytest.raises((InputError, SystemExit)) as raised:
        evaluate(encoder, drawn, *options)
    assert re.search(message, str(raised.value) + capsys.readouterr().err)


def test_transformers_are_refused_with_the_reason(tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "torchvision", lambda: None)
    vit = VisionTransformer(384, 12, 12, size=32, stop_grad_conv1=False)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(InputError, match="R50-C4 is made of a ResNet's stages"):
        evaluate(tmp_path / "vit.pth", drawn, "--heads", "12")


# The detector, where torchvision is


def test_the_detector_is_made_of_the_encoders_stages_and_torchvisions_resnet_agrees() -> None:
    torchvision = torchvision_or_skip()
    from engine.evaluate.detection.faster_rcnn import faster_rcnn

    torch.manual_seed(0)
    backbone = Architecture("resnet50").build().eval()
    assert isinstance(backbone, ResNet)
    own = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = faster_rcnn(backbone, 20, (480, 800), 1333).eval()
    names = {id(value): name for name, value in backbone.named_parameters()}
    assert {id(value) for value in model.parameters()} >= names.keys()  # all of the encoder is in it
    new = [name for name, value in model.named_parameters() if id(value) not in names]
    assert {name.split(".")[0] for name in new} == {"rpn", "roi_heads"}
    reference = torchvision.models.resnet50()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(own, strict=True)
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


def test_regions_are_pooled_where_they_are() -> None:
    torchvision_or_skip()
    from engine.evaluate.detection.faster_rcnn import Pool

    columns = (16 * torch.arange(8.0) + 8).expand(1, 1, 8, 8)  # of pixels, at the cells' middles
    boxes = [torch.tensor([[16.0, 16.0, 96.0, 96.0]])]
    pooled = Pool(16)({"0": columns}, boxes, [(128, 128)])
    middles = 16 + (torch.arange(14) + 0.5) * 80 / 14
    assert torch.allclose(pooled[0, 0, 5], middles, atol=1e-3)


@pytest.mark.slow
def test_training_lowers_the_loss_goes_on_and_is_scored(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision_or_skip()
    monkeypatch.setattr(trainer, "_KEEP_AFTER", 1)
    losses, measured = [], detect.losses

    def noted(*arguments: Any) -> torch.Tensor:
        found = measured(*arguments)
        losses.append(found.item())
        return found

    monkeypatch.setattr(detect, "losses", noted)
    monkeypatch.setattr(detect, "_WARMUP", 2)
    found = json.loads(evaluate(encoder, drawn, "--iterations", "9", "--lr", "0.05").read_text())
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert found["images"] == 6
    assert set(found["per_class"]) <= set(CLASSES)
    before = len(losses)
    again = json.loads(evaluate(encoder, drawn, "--iterations", "9", "--lr", "0.05").read_text())
    assert len(losses) == before
    assert again["ap"] == found["ap"]


def test_a_dry_run_keeps_nothing(
    encoder: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision_or_skip()
    (tmp_path / "passing").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "passing"))
    assert not evaluate(encoder, drawn, "--dry-run").exists()
    assert "detection, 2 iterations: AP" in capsys.readouterr().out
    assert not list((tmp_path / "passing").glob("millrace-*"))
