"""The segmentation command: it learns, resumes exactly, scores on two ranks as on one, and refuses wrong masks."""

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
from safetensors.torch import load_file, save_file

from engine.evaluate import trainer
from engine.evaluate.__main__ import run
from engine.evaluate.segmentation import segment
from engine.evaluate.segmentation.fcn import Fcn
from engine.parallel import collectives
from engine.parallel.sync_batchnorm import synchronize
from engine.weights.load import load_encoder
from methods.encoders import resnet
from methods.norm import count_batches
from pipeline.augment.color import Statistics, normalize
from pipeline.dense.masks import open_masked
from pipeline.dense.scale_crops import ScaleCrops
from pipeline.dense.scenes import scene, write
from pipeline.system.errors import InputError, RunFailed
from tests.engine.evaluate.conftest import copy_of, interrupt_once
from tests.gloo import on_ranks


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 scenes of uneven sizes as images/ and masks/, of two classes, background and object."""
    folder = tmp_path_factory.mktemp("scenes")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for index in range(41):
        made, width = scene(0, index, 64), 64 - 3 * (index % 5)
        mask = np.where(made.mask == 255, 255, np.minimum(made.mask, 1)).astype(np.uint8)
        Image.fromarray(made.image[:, :width]).save(folder / "images" / f"{index:02d}.jpg", quality=95)
        Image.fromarray(mask[:, :width]).save(folder / "masks" / f"{index:02d}.png")
    return folder


def start(encoder: Path, drawn: Path, *more: str) -> Path:
    """Segment; return the path of the result."""
    out = encoder.parent / "out"
    options = ["--size", "49", "--batch", "4", "--lr", "0.3", "--cpu", "--precision", "no", "--workers", "1"]
    run(["segment", str(encoder), "--train", str(drawn), "--out", str(out), *options, *more])
    return out / f"segment{'_frozen' * ('--frozen' in more)}.json"


def evaluate(encoder: Path, drawn: Path, *more: str) -> dict[str, Any]:
    """Segment; return the result."""
    return json.loads(start(encoder, drawn, *more).read_text())


def test_rates_are_the_papers() -> None:
    done = [0, 0.69, 0.7, 0.89, 0.9, 0.999]
    assert [segment.rate(0.003, share) for share in done] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5])


@pytest.mark.slow
def test_training_beats_the_best_constant(encoder: Path, drawn: Path) -> None:
    result = evaluate(encoder, drawn, "--iterations", "30")
    assert result["images"] == 5  # every tenth
    masks = [np.asarray(Image.open(path)) for path in sorted((drawn / "masks").iterdir())[::10]]
    pixels = np.concatenate([mask[mask != 255] for mask in masks])
    constant = max((pixels == number).mean() for number in (0, 1)) / 2
    assert result["miou"] > constant + 0.2
    assert result["interval"][0] <= result["miou"] <= result["interval"][1]
    assert list(result["per_class"]) == ["0", "1"]
    # the same score by a loop over images, with the network of the checkpoint
    model = Fcn(load_encoder(encoder).backbone, 2, frozen=False, seed=0)
    state = load_file(next((encoder.parent / "out" / "segment").glob("step_*/state.safetensors")))
    model.load_state_dict({k.removeprefix("model|"): v for k, v in state.items() if k.startswith("model|")})
    model.eval()
    both, union = np.zeros(2), np.zeros(2)
    mean, std = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for path, mask in zip(sorted((drawn / "images").iterdir())[::10], masks, strict=True):
        image = (np.asarray(Image.open(path), np.float32) / 255 - mean) / std
        with torch.no_grad():
            predicted = model(torch.from_numpy(image).permute(2, 0, 1)[None])[0].argmax(dim=0).numpy()
        for number in (0, 1):
            positive, true = (predicted == number) & (mask != 255), mask == number
            both[number] += (positive & true).sum()
            union[number] += (positive | true).sum()
    assert result["miou"] == pytest.approx((both / union).mean(), abs=1e-3)


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("step_*/state.safetensors")))


def test_images_are_normalized_as_the_encoders_were(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in the test: by the mean and deviation in the file's header."""
    stated, normalized = json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "width": 0.25}), []
    file = encoder.with_suffix(".safetensors")
    save_file(torch.load(encoder, weights_only=True), file, metadata={"millrace": stated})

    def record(images: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        normalized.append(statistics)
        return normalize(images, statistics)

    for module in ("engine.evaluate.segmentation.segment", "pipeline.dense.scale_crops"):
        monkeypatch.setattr(f"{module}.normalize", record)
    evaluate(file, drawn, "--iterations", "1", "--frozen")
    assert len(normalized) >= 2
    assert set(normalized) == {((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}


@pytest.mark.parametrize("frozen", [["--frozen"], pytest.param([], marks=pytest.mark.slow)])
def test_an_interrupted_training_resumes_exactly(
    frozen: list[str], encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_MIN_STEPS_TO_SAVE", 1)
    options = ["--batch", "12", "--iterations", "7", *frozen]  # two epochs and a third of the next
    name = f"segment{'_frozen' * bool(frozen)}"
    undisturbed = evaluate(encoder, drawn, *options)
    other = copy_of(encoder)
    saves = interrupt_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(other, drawn, *options)
    resumed = evaluate(other, drawn, *options)
    assert saves == [1, 2, 3]
    assert resumed["per_class"] == undisturbed["per_class"]
    one, two = _state(encoder.parent / "out" / name), _state(other.parent / "out" / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(two[key], value) for key, value in one.items())
    assert any("backbone" in key for key in one) != bool(frozen)
    with pytest.raises(InputError, match="iterations was 7, now 8"):
        evaluate(other, drawn, *[option.replace("7", "8") for option in options])


def test_a_frozen_backbone_that_changes_is_detected(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fcn, "train", torch.nn.Module.train)  # the usual mistake: running statistics move
    with pytest.raises(RunFailed, match="backbone changed"):
        evaluate(encoder, drawn, "--iterations", "1", "--frozen")


def _steps(data: Path, to: Path) -> None:
    """Train the entire network for three steps in float64; pixels without a class are unevenly distributed."""
    accelerator, world = Accelerator(cpu=True), collectives.world()
    torch.manual_seed(0)
    model = Fcn(resnet("resnet18", stem="small", width=0.25), 2, frozen=False, seed=0).double()
    synchronize(model)
    wrapped, optimizer = accelerator.prepare(model), torch.optim.SGD(model.parameters(), lr=0.1)
    crops = ScaleCrops(open_masked(data), size=49, batch=4, rank=collectives.rank(), world=world, workers=1)
    for images, masks in crops.crops(0, 3, torch.device("cpu")):
        accelerator.backward(segment.pixel_loss(wrapped.train()(images.double()), masks))
        optimizer.step()
        optimizer.zero_grad()
        count_batches(model, 1)
    crops.close()
    if collectives.rank() == 0:
        torch.save(model.state_dict(), to)


def _on_two(encoder: str, drawn: str, *more: str) -> None:
    start(Path(encoder), Path(drawn), *more)
    start(Path(encoder), Path(drawn), *more, "--out", str(Path(encoder).with_name("alone")))
    _steps(Path(drawn), Path(encoder).with_name("two.pth"))


@pytest.mark.slow
def test_two_ranks_train_and_score_as_one(encoder: Path, drawn: Path) -> None:
    """Neither batch nor world size divides the 41 images. Scores of the same weights are equal exactly."""
    options = ["--iterations", "3", "--test", str(drawn), "--frozen"]
    alone = evaluate(encoder, drawn, *options)
    state = _state(encoder.parent / "out" / "segment_frozen")
    _steps(drawn, encoder.with_name("one.pth"))
    (encoder.parent / "out").rename(encoder.parent / "alone")
    on_ranks(2, _on_two, str(encoder), str(drawn), *options)
    both, of_one = (
        json.loads((encoder.parent / folder / "segment_frozen.json").read_text()) for folder in ("out", "alone")
    )
    assert both["world_size"] == of_one["world_size"] == 2
    for key in ("miou", "interval", "pixel_accuracy", "per_class", "images"):
        assert of_one[key] == alone[key]
    for key, value in _state(encoder.parent / "out" / "segment_frozen").items():
        assert torch.allclose(value, state[key], atol=2e-4, rtol=1e-3), key
    assert both["miou"] == pytest.approx(alone["miou"], abs=2e-3)
    one, two = (torch.load(encoder.with_name(f"{name}.pth")) for name in ("one", "two"))
    assert all(torch.allclose(two[key], value, atol=1e-9, rtol=1e-7) for key, value in one.items())


def test_wrong_masks_are_refused_before_training(
    encoder: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "train", lambda *arguments: pytest.fail("it trained"))
    data = Path(shutil.copytree(drawn, tmp_path / "data"))
    mask = data / "masks" / "17.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(mask)), 2)).save(mask)
    with pytest.raises(InputError, match=r"17\.png: has class 2, and there are 2, 0 to 1, except 255"):
        evaluate(encoder, data, "--classes", "2")
    for file in (data / "masks").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(file)), 255)).save(file)
    with pytest.raises(InputError, match="0 classes in the training masks, 0 in the test masks"):
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
def test_impossible_options_are_refused(
    options: list[str], message: str, encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "train", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(InputError, match=message):
        evaluate(encoder, drawn, *options)


def test_sets_of_vocs_layout_are_used(encoder: Path, tmp_path: Path) -> None:
    write(tmp_path / "voc", 9, 2, size=64)
    result = evaluate(encoder, tmp_path / "voc", "--iterations", "1")
    assert result["images"] == 2
    assert result["settings"]["classes"] == 11
