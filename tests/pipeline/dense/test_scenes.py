"""Tests of synthetic scenes: pure functions of seed and index, with matching masks, boxes and files."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.dense.masks import IGNORED
from pipeline.dense.scenes import SMALLEST, scene, write
from pipeline.sources.synthetic import CLASSES
from pipeline.system.errors import InputError


def test_a_scene_depends_on_seed_index_and_size_alone() -> None:
    first, again = scene(3, 7, 80), scene(3, 7, 80)
    assert (first.image == again.image).all()
    assert (first.mask == again.mask).all()
    assert first.objects == again.objects
    for other in (scene(4, 7, 80), scene(3, 8, 80)):
        assert (other.image != first.image).any()
        assert (other.mask != first.mask).any()


def test_masks_match_the_boxes() -> None:
    for index in range(20):
        drawn, rest = scene(0, index, 96), np.ones((96, 96), bool)
        assert 1 <= len(drawn.objects) <= 4
        for label, (left, top, right, bottom) in drawn.objects:
            where = np.s_[top - 1 : bottom, left - 1 : right]
            inside = drawn.mask[where]
            assert set(np.unique(inside)) == {0, label + 1, IGNORED}
            assert all((inside != 0).any(axis=axis).all() for axis in (0, 1))  # it touches each side of its box
            rest[where] = False
        assert (drawn.mask[rest] == 0).all()


def test_all_classes_occur_about_equally() -> None:
    counts = np.bincount([one.label for index in range(100) for one in scene(1, index, 64).objects], minlength=10)
    assert len(counts) == len(CLASSES)
    assert counts.min() > 0.5 * counts.mean()


def test_files_are_in_vocs_layout(tmp_path: Path) -> None:
    folder = tmp_path / "voc"
    write(folder, 3, 2, seed=5, size=64)
    sets = {path.stem: path.read_text().split() for path in folder.glob("ImageSets/*/*.txt")}
    assert sets["train"] == sets["trainval"] == ["000001", "000002", "000003"]
    assert sets["val"] == sets["test"] == ["000004", "000005"]
    drawn, name = scene(5, 3, 64), "000004"
    mask = Image.open(folder / "SegmentationClass" / f"{name}.png")
    assert mask.mode == "P"
    assert (np.asarray(mask) == drawn.mask).all()
    palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert palette[[1, 15, 20, 255]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]  # VOC's
    image = np.asarray(Image.open(folder / "JPEGImages" / f"{name}.jpg")).astype(int)
    assert np.abs(image - drawn.image).mean() < 8
    root = ElementTree.parse(folder / "Annotations" / f"{name}.xml").getroot()
    boxes = [
        (
            one.findtext("name"),
            tuple(int(one.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")),
        )
        for one in root.findall("object")
    ]
    assert boxes == [(CLASSES[one.label], one.box) for one in drawn.objects]


def test_a_used_folder_and_small_scenes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="is not empty"):
        write(tmp_path, 1, 1)
    with pytest.raises(InputError, match=f"choose {SMALLEST} or more"):
        scene(0, 0, SMALLEST - 1)
