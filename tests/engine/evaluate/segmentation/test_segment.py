"""Segmentation: scores against scikit-learn and loops, the network by hand; training learns, goes on, and divides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from engine.evaluate import trainer
from engine.evaluate.__main__ import run
from engine.evaluate.segmentation import segment
from engine.evaluate.segmentation.fcn import Fcn, upsampled
from engine.evaluate.segmentation.miou import count, overlap
from engine.parallel import collectives
from engine.parallel.sync_batchnorm import synchronize
from engine.weights.load import digest, load_encoder
from methods.encoders import resnet
from methods.vit import VisionTransformer
from pipeline.dense.masks import open_masked
from pipeline.dense.scale_crops import ScaleCrops
from pipeline.dense.scenes import scene, write
from pipeline.system.errors import InputError, RunFailed
from tests.engine.breaking import broken_off_once
from tests.gloo import on_ranks


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 scenes as images/ and masks/, whose classes are background and object; the sizes are uneven."""
    folder = tmp_path_factory.mktemp("scenes")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for index in range(41):
        made, width = scene(0, index, 64), 64 - 3 * (index % 5)
        mask = np.where(made.mask == 255, 255, np.minimum(made.mask, 1)).astype(np.uint8)
        Image.fromarray(made.image[:, :width]).save(folder / "images" / f"{index:02d}.jpg", quality=95)
        Image.fromarray(mask[:, :width]).save(folder / "masks" / f"{index:02d}.png")
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small random encoder, as a state dict."""
    torch.manual_seed(0)
    torch.save(resnet("resnet18", stem="small", width=0.25).state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def start(encoder: Path, drawn: Path, *more: str) -> Path:
    """Segment, and return where the result stands."""
    out = encoder.parent / "out"
    options = ["--size", "49", "--batch", "4", "--lr", "0.3", "--cpu", "--precision", "no", "--workers", "1"]
    run(["segment", str(encoder), "--train", str(drawn), "--out", str(out), *options, *more])
    return out / f"segment{'_frozen' * ('--frozen' in more)}.json"


def evaluate(encoder: Path, drawn: Path, *more: str) -> dict[str, Any]:
    """Segment, and return what was written."""
    return json.loads(start(encoder, drawn, *more).read_text())


# Scores


def _masks(seed: int, images: int = 5, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Masks and predictions that agree in part; class 4 is in no mask, class 5 in neither, and some pixels are 255."""
    random = np.random.default_rng(seed)
    masks = random.integers(0, classes - 2, (images, 9, 7))
    predicted = np.where(random.random(masks.shape) < 0.6, masks, random.integers(0, classes - 1, masks.shape))
    masks[random.random(masks.shape) < 0.2] = 255
    return masks, predicted


def test_scores_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    masks, predicted = _masks(0)
    found = overlap(count(torch.from_numpy(predicted), torch.from_numpy(masks), 6).numpy(), [*"abcdef"])
    known = masks != 255
    ious = metrics.jaccard_score(masks[known], predicted[known], average=None, labels=range(5))
    assert list(found.per_class) == [*"abcde"]  # f occurs nowhere
    assert list(found.per_class.values()) == pytest.approx(ious)
    assert found.per_class["e"] == 0
    assert found.miou == pytest.approx(ious.mean())
    assert found.pixel_accuracy == pytest.approx((masks == predicted)[known].mean())


def test_the_interval_is_the_bootstraps_over_images() -> None:
    masks, predicted = _masks(1, images=30)
    counts = count(torch.from_numpy(predicted), torch.from_numpy(masks), 6).numpy()
    random, means = np.random.default_rng(7), []
    for _ in range(1500):
        rows = random.integers(30, size=30)
        ious = []
        for number in range(6):
            mine, other = (array[rows][masks[rows] != 255] == number for array in (masks, predicted))
            ious += [(mine & other).sum() / (mine | other).sum()] if (mine | other).any() else []
        means.append(np.mean(ious))
    low, high = overlap(counts).interval
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.01)


# The network


def test_maps_are_upsampled_to_the_pixels_that_they_are_of() -> None:
    ramp = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 3)
    rows = upsampled(16 * ramp, 16, centered=False)[0, 0, :, 0]
    assert torch.allclose(rows[:65], torch.arange(65.0), atol=1e-4)  # a ResNet's cell i is centered on pixel 16 i
    rows = upsampled(16 * ramp, 16, centered=True)[0, 0, :, 0]
    assert torch.allclose(rows[8:72], torch.arange(8.0, 72) - 7.5, atol=1e-4)  # a patch's, on its middle
    maps = torch.randn(1, 2, 33, 33)
    papers = F.interpolate(maps, (513, 513), mode="bilinear", align_corners=True)
    assert torch.allclose(upsampled(maps, 16, centered=False)[..., :513, :513], papers, atol=1e-4)


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 16), ("small", 4)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_last_stage_is_dilated(arch: str, stem: Any, stride: int) -> None:
    """Its first block by hand: 3x3 convolutions of dilation 2, none of stride 2; a cell is centered on its pixel."""
    backbone = resnet(arch, stem=stem, width=0.25).eval()
    before = digest(backbone)
    model = Fcn(backbone, 3, frozen=True, seed=0).eval()
    assert model.stride == stride
    assert digest(backbone) == before
    x, block = torch.randn(2, backbone.layer4[0].conv1.in_channels, 6, 5), backbone.layer4[0]

    def conv(x: torch.Tensor, one: torch.nn.Conv2d) -> torch.Tensor:
        wide = one.weight.shape[-1] == 3
        return F.conv2d(x, one.weight, padding=2 * wide, dilation=1 + wide)

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
    # where each patch has the position's direction alone, interpolated positions keep their order
    larger = vit.maps(F.interpolate(images, (128, 128)))
    assert larger.shape == (2, 192, 8, 8)


# Training


def test_rates_are_the_papers() -> None:
    done = [0, 0.69, 0.7, 0.89, 0.9, 0.999]
    assert [segment.rate(0.003, share) for share in done] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5])


def test_training_learns_more_than_the_best_constant(encoder: Path, drawn: Path) -> None:
    found = evaluate(encoder, drawn, "--iterations", "30")
    assert found["images"] == 5  # every tenth
    masks = [np.asarray(Image.open(path)) for path in sorted((drawn / "masks").iterdir())[::10]]
    pixels = np.concatenate([mask[mask != 255] for mask in masks])
    constant = max((pixels == number).mean() for number in (0, 1)) / 2
    assert found["miou"] > constant + 0.2
    assert found["interval"][0] <= found["miou"] <= found["interval"][1]
    assert list(found["per_class"]) == ["0", "1"]
    # the loop: an image at a time, by the network that was kept
    model = Fcn(load_encoder(encoder).backbone, 2, frozen=False, seed=0)
    kept = load_file(next((encoder.parent / "out" / "segment").glob("step_*/state.safetensors")))
    model.load_state_dict({k.removeprefix("model|"): v for k, v in kept.items() if k.startswith("model|")})
    model.eval()
    both, union = np.zeros(2), np.zeros(2)
    mean, std = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for path, mask in zip(sorted((drawn / "images").iterdir())[::10], masks, strict=True):
        image = (np.asarray(Image.open(path), np.float32) / 255 - mean) / std
        with torch.no_grad():
            predicted = model(torch.from_numpy(image).permute(2, 0, 1)[None])[0].argmax(dim=0).numpy()
        for number in (0, 1):
            own, true = (predicted == number) & (mask != 255), mask == number
            both[number] += (own & true).sum()
            union[number] += (own | true).sum()
    assert found["miou"] == pytest.approx((both / union).mean(), abs=1e-3)


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("step_*/state.safetensors")))


@pytest.mark.parametrize("frozen", [["--frozen"], pytest.param([], marks=pytest.mark.slow)])
def test_training_goes_on_where_it_was(
    frozen: list[str], encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer, "_KEEP_AFTER", 1)
    options = ["--batch", "12", "--iterations", "7", *frozen]  # two epochs and a third of the next
    name = f"segment{'_frozen' * bool(frozen)}"
    whole = evaluate(encoder, drawn, *options)
    other = tmp_path / "other"
    other.mkdir()
    again = other / "encoder.pth"
    again.write_bytes(encoder.read_bytes())
    saves = broken_off_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(again, drawn, *options)
    resumed = evaluate(again, drawn, *options)
    assert saves == [1, 2, 3]
    assert resumed["per_class"] == whole["per_class"]
    one, two = _state(encoder.parent / "out" / name), _state(other / "out" / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(two[key], value) for key, value in one.items())
    assert any("backbone" in key for key in one) != bool(frozen)
    with pytest.raises(InputError, match="iterations 7 there, 8 here"):
        evaluate(again, drawn, *[option.replace("7", "8") for option in options])


def test_a_frozen_backbone_that_changes_is_found_out(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fcn, "train", torch.nn.Module.train)  # the usual mistake: running statistics move
    with pytest.raises(RunFailed, match="backbone changed"):
        evaluate(encoder, drawn, "--iterations", "1", "--frozen")


def _steps(data: Path, to: Path) -> None:
    """Three steps of the whole network in float64, of which pixels without a class are not spread evenly."""
    accelerator, world = Accelerator(cpu=True), collectives.world()
    torch.manual_seed(0)
    model = Fcn(resnet("resnet18", stem="small", width=0.25), 2, frozen=False, seed=0).double()
    if world > 1:
        synchronize(model, torch.device("cpu"))
    wrapped, optimizer = accelerator.prepare(model), torch.optim.SGD(model.parameters(), lr=0.1)
    crops = ScaleCrops(open_masked(data), size=49, batch=4, rank=collectives.rank(), world=world, workers=1)
    for images, masks in crops.crops(0, 3, torch.device("cpu")):
        accelerator.backward(segment.pixel_loss(wrapped.train()(images.double()), masks))
        optimizer.step()
        optimizer.zero_grad()
    crops.close()
    if collectives.rank() == 0:
        torch.save(model.state_dict(), to)


def _of_two(encoder: str, drawn: str, *more: str) -> None:
    start(Path(encoder), Path(drawn), *more)
    start(Path(encoder), Path(drawn), *more, "--out", str(Path(encoder).with_name("alone")))
    _steps(Path(drawn), Path(encoder).with_name("two.pth"))


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(encoder: Path, drawn: Path) -> None:
    """Of 41 images, which neither batches nor processes divide; scores of the same weights are the same exactly."""
    options = ["--iterations", "3", "--test", str(drawn), "--frozen"]
    alone = evaluate(encoder, drawn, *options)
    state = _state(encoder.parent / "out" / "segment_frozen")
    _steps(drawn, encoder.with_name("one.pth"))
    (encoder.parent / "out").rename(encoder.parent / "alone")
    on_ranks(2, _of_two, str(encoder), str(drawn), *options)
    both, of_one = (
        json.loads((encoder.parent / folder / "segment_frozen.json").read_text()) for folder in ("out", "alone")
    )
    assert both["processes"] == of_one["processes"] == 2
    for key in ("miou", "interval", "pixel_accuracy", "per_class", "images"):
        assert of_one[key] == alone[key]
    for key, value in _state(encoder.parent / "out" / "segment_frozen").items():
        assert torch.allclose(value, state[key], atol=2e-4, rtol=1e-3), key
    assert both["miou"] == pytest.approx(alone["miou"], abs=2e-3)
    one, two = (torch.load(encoder.with_name(f"{name}.pth")) for name in ("one", "two"))
    assert all(torch.allclose(two[key], value, atol=1e-9, rtol=1e-7) for key, value in one.items())


# Input


def test_wrong_masks_end_the_command_before_anything_is_trained(
    encoder: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "train", lambda *arguments: pytest.fail("it trained"))
    data = Path(shutil.copytree(drawn, tmp_path / "data"))
    mask = data / "masks" / "17.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(mask)), 2)).save(mask)
    with pytest.raises(InputError, match=r"17\.png: has class 2, and there are 2, 0 to 1, besides 255"):
        evaluate(encoder, data, "--classes", "2")
    for file in (data / "masks").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(file)), 255)).save(file)
    with pytest.raises(InputError, match="0 classes in masks for training, 0 in those for testing"):
        evaluate(encoder, data)
    Image.open(mask).resize((10, 10)).save(mask)
    with pytest.raises(InputError, match=r"17\.png: 10 x 10 pixels"):
        evaluate(encoder, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", "0"], "--iterations 0: choose a number above 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--size", "16"], "--size 16: choose 32 to 4096"),
        (["--classes", "300"], "--classes 300: choose 255 at most"),
        (["--test", "nowhere"], "nowhere: has neither VOC's layout"),
    ],
)
def test_options_that_cannot_work_are_refused(
    options: list[str], message: str, encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "train", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(InputError, match=message):
        evaluate(encoder, drawn, *options)


def test_vocs_layout_is_read_by_its_sets(encoder: Path, tmp_path: Path) -> None:
    write(tmp_path / "voc", 9, 2, size=64)
    found = evaluate(encoder, tmp_path / "voc", "--iterations", "1")
    assert found["images"] == 2
    assert found["settings"]["classes"] == 11
