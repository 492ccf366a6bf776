"""The detection command: rates, flips, options, training on drawn boxes."""

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
from methods.encoders import resnet
from methods.vit import VisionTransformer
from pipeline.dense.scenes import write
from pipeline.dense.voc_boxes import open_boxed
from pipeline.sources.synthetic import CLASSES
from pipeline.system.errors import InputError
from tests.torchvision_operators import torchvision_or_skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in VOC's layout, 12 training and 6 test images."""
    folder = tmp_path_factory.mktemp("scenes") / "voc"
    write(folder, 12, 6, size=64)
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small random encoder, as a state dict."""
    torch.manual_seed(0)
    torch.save(resnet("resnet18", width=0.25).state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def test_rates_are_those_of_the_recipe() -> None:
    at = [0, 50, 100, 17999, 18000, 21999, 22000]
    expected = [2e-5, 0.02 * 0.5005, 0.02, 0.02, 2e-3, 2e-3, 2e-4]
    assert [detect.rate(0.02, step, 24000) for step in at] == pytest.approx(expected)


def test_boxes_are_flipped_with_their_image(drawn: Path) -> None:
    data = open_boxed([(drawn, "trainval")])
    assert set(data.classes) == set(CLASSES)
    for index in range(len(data)):
        image, objects = data.read(index), data.objects[index]
        flipped, moved = detect._read(data, index, True)
        for box, other in zip(objects.boxes.astype(int), moved.boxes.astype(int), strict=True):
            inside = image[box[1] : box[3], box[0] : box[2]]
            assert (flipped[other[1] : other[3], other[0] : other[2]] == inside[:, ::-1]).all()


def evaluate(encoder: Path, drawn: Path, *more: str) -> Path:
    """Detect; return the path of the result."""
    out = encoder.parent / "out"
    options = ["--train", str(drawn), "--test", str(drawn), "--sizes", "96", "--largest", "96", "--batch", "4"]
    run(["detect", str(encoder), *options, "--cpu", "--workers", "1", "--out", str(out), *more])
    return out / "detect.json"


def test_a_missing_torchvision_is_reported(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match="torchvision is not installed, and detection needs it: pip install"):
        evaluate(encoder, drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", "0"], "--iterations 0"),
        (["--sizes", "16", "96"], "--sizes 16 to 96: choose 32 to --largest 96"),
        (["--train", "nowhere:trainval"], r"nowhere/ImageSets/Main/trainval.txt: cannot be read"),
        (["--test-set"], "--test-set: no such option"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], message: str, encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(detect, "torchvision", lambda: None)
    with pytest.raises((InputError, SystemExit)) as raised:
        evaluate(encoder, drawn, *options)
    assert re.search(message, str(raised.value) + capsys.readouterr().err)


def test_transformers_are_refused(tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "torchvision", lambda: None)
    vit = VisionTransformer(384, 12, 12, size=32, stop_grad_conv1=False)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(InputError, match="R50-C4 is built from a ResNet's stages"):
        evaluate(tmp_path / "vit.pth", drawn, "--heads", "12")


@pytest.mark.slow
def test_training_lowers_the_loss_and_is_done_once(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_or_skip()
    monkeypatch.setattr(trainer, "_MIN_STEPS_TO_SAVE", 1)
    losses, total_loss = [], detect.total_loss

    def recorded(*arguments: Any) -> torch.Tensor:
        loss = total_loss(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(detect, "total_loss", recorded)
    monkeypatch.setattr(detect, "_WARMUP_STEPS", 2)
    result = json.loads(evaluate(encoder, drawn, "--iterations", "9", "--lr", "0.05").read_text())
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert result["images"] == 6
    assert set(result["per_class"]) <= set(CLASSES)
    before = len(losses)
    again = json.loads(evaluate(encoder, drawn, "--iterations", "9", "--lr", "0.05").read_text())
    assert len(losses) == before
    assert again["ap"] == result["ap"]


def test_a_dry_run_saves_nothing(
    encoder: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision_or_skip()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert not evaluate(encoder, drawn, "--dry-run").exists()
    assert "detection, 2 iterations: AP" in capsys.readouterr().out
    assert not list((tmp_path / "temporary").iterdir())
