"""Encoders and images of runs: their data, given data, damaged images, missing parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import storage
from engine.report import page
from engine.report.run_folder import read_runs
from engine.report.sample import QUERIES
from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.system.errors import InputError
from tests.engine.report.conftest import options, text_of
from tests.engine.run_folders import EPOCHS, settings, write_checkpoint, write_run
from tests.side_files import copy_side_files


def test_given_data_may_be_unlabeled(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save(images / f"{number}.jpg")
    prepare(str(images), tmp_path / "flat.beton", workers=1, quiet=True)
    run = write_run(tmp_path / "a")
    write_checkpoint(run, settings())
    html = page.report(read_runs([run]), options(tmp_path / "flat.beton")).html
    assert html.count('<div class="query') == QUERIES
    assert "own class" not in html
    assert "<figure class=" not in html
    with pytest.raises(InputError, match=r"nowhere\.beton"):
        page.report(read_runs([run]), options(tmp_path / "nowhere.beton"))


def test_damaged_images_are_removed_for_all_encoders(drawn: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.beton"
    content = bytearray(drawn.read_bytes())
    beton = Beton(drawn)
    for index in (3, 77):
        start = int(beton.pointers[index])
        content[start + 100 : start + 140] = bytes(40)
    copy.write_bytes(content)
    copy_side_files(drawn, copy)
    run = write_run(tmp_path / "a", settings(copy))
    write_checkpoint(run, settings(copy))
    text = text_of(page.report(read_runs([run]), options(limit=200)).html)
    assert "A sample of 198 of 200 images" in text


def test_without_an_intact_checkpoint_only_images_are_missing(drawn: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", settings(drawn), epochs=2.5)
    text = text_of(page.report(read_runs([run]), options()).html)
    assert "there is no intact checkpoint yet" in text
    assert "at epoch 2.50 of 4" in text
    broken = write_checkpoint(run, settings(drawn)) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    text = text_of(page.report(read_runs([run]), options()).html)
    assert "damaged" in text
    write_checkpoint(run, settings(drawn), step=10)
    html = page.report(read_runs([run]), options()).html
    assert "A checkpoint was skipped" in text_of(html)
    assert "step_00000010" in text_of(html)


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "/dev/zero", "[]", "**", "gone/{1..2}.tar"])
def test_impossible_data_names_are_noted(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", settings(name))
    write_checkpoint(run, settings())
    assert "Its encoder is not shown" in text_of(page.report(read_runs([run]), options()).html)


def test_missing_data_and_collapse_are_noted(drawn: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", settings("gone.beton"))
    write_checkpoint(run, settings())
    assert "gone.beton: no such file" in text_of(page.report(read_runs([run]), options()).html)
    write_zeros(run)
    text = text_of(page.report(read_runs([run]), options(drawn)).html)
    assert "it is collapsed" in text


def write_zeros(run: Path) -> None:
    """Write a checkpoint with weights of 0, which gives the same features for all images."""
    path, _ = storage.newest(run / "checkpoints")
    assert path is not None
    tensors, _ = storage.load(path)
    model = {name: torch.zeros_like(value) for name, value in tensors["model"].items()}
    rest = {"loader": {}, "monitor": {}, "settings": settings().as_dict()}
    storage.write(run / "checkpoints", EPOCHS * 100, {"model": model}, rest)


def test_relative_data_paths_begin_where_training_was_started(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "own.beton").write_bytes(drawn.read_bytes())
    run = write_run(tmp_path / "runs" / "a")
    chosen = settings("own.beton")
    chosen.out = "runs/a"
    chosen.write(run / "config.yaml")
    write_checkpoint(run, chosen)
    assert "Images of own.beton" in text_of(page.report(read_runs([run]), options()).html)
