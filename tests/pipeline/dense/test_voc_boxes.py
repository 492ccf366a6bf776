"""Tests of images with boxes in VOC's layout, and of invalid files, which are named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.dense.scenes import scene, write
from pipeline.dense.voc_boxes import open_boxed
from pipeline.sources.synthetic import CLASSES
from pipeline.system.errors import InputError


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three scenes for training and two for testing."""
    write(tmp_path / "voc", 3, 2, size=64)
    return tmp_path / "voc"


def _edit(file: Path, pattern: str, replacement: str) -> None:
    text = file.read_text()
    assert re.search(pattern, text)
    file.write_text(re.sub(pattern, replacement, text, count=1))


def test_images_of_several_folders_have_their_boxes(voc: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", 1, 1, seed=9, size=64)
    _edit(voc / "Annotations" / "000002.xml", "<difficult>0", "<difficult>1")
    data = open_boxed([(voc, "trainval"), (tmp_path / "other", "test")], CLASSES)
    assert len(data) == 4
    assert data.classes == CLASSES
    drawn = [scene(0, 0, 64), scene(0, 1, 64), scene(0, 2, 64), scene(9, 1, 64)]
    for number, (made, objects) in enumerate(zip(drawn, data.objects, strict=True)):
        assert objects.labels.tolist() == [one.label for one in made.objects]
        assert (objects.boxes + [1, 1, 0, 0]).astype(int).tolist() == [list(one.box) for one in made.objects]
        assert objects.difficult.tolist() == [number == 1 and place == 0 for place in range(len(made.objects))]
    assert np.abs(data.read(3).astype(int) - drawn[3].image).mean() < 8
    some = data.part(2)
    assert (len(some), some.images) == (2, data.images[:2])
    assert some.fingerprint != data.fingerprint != open_boxed([(voc, "trainval")], CLASSES).fingerprint


def test_classes_are_vocs_or_all_that_occur(voc: Path) -> None:
    occurring = {CLASSES[one.label] for index in range(3) for one in scene(0, index, 64).objects}
    assert open_boxed([(voc, "trainval")]).classes == tuple(sorted(occurring))
    for file in (voc / "Annotations").iterdir():
        file.write_text(re.sub("<name>.*?</name>", "<name>dog</name>", file.read_text()))
    data = open_boxed([(voc, "trainval")])
    assert len(data.classes) == 20
    assert {data.classes[label] for one in data.objects for label in one.labels} == {"dog"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda voc: (voc / "JPEGImages" / "000002.jpg").unlink(),
            r"trainval.txt: .*000002.jpg and 0 other files are missing",
        ),
        (lambda voc: (voc / "ImageSets/Main/trainval.txt").unlink(), r"the sets are test: give FOLDER:SET"),
        (lambda voc: (voc / "ImageSets/Main/trainval.txt").write_text(""), r"trainval.txt: it names no image"),
        (lambda voc: (voc / "Annotations/000002.xml").write_text("<annotation>"), r"000002.xml: not an annotation"),
        (lambda voc: _edit(voc / "Annotations/000002.xml", "<xmin>.*?</xmin>", ""), r"000002.xml: not an annotation"),
        (
            lambda voc: _edit(voc / "Annotations/000002.xml", "<xmax>.*?</xmax>", "<xmax>65</xmax>"),
            r"000002.xml: the box .* 65, \d+ is not in .*000002.jpg, of 64 x 64 pixels",
        ),
        (lambda voc: _edit(voc / "Annotations/000002.xml", "<ymax>.*?</ymax>", "<ymax>1</ymax>"), r"the box"),
        (
            lambda voc: _edit(voc / "Annotations/000002.xml", "<name>.*?</name>", "<name>cat</name>"),
            r"has 'cat', which",
        ),
        (lambda voc: (voc / "JPEGImages" / "000002.jpg").write_bytes(b"junk"), r"000002.jpg: cannot be read"),
    ],
)
def test_missing_and_invalid_files_are_named(spoil: Callable[[Path], None], message: str, voc: Path) -> None:
    spoil(voc)
    with pytest.raises(InputError, match=message):
        open_boxed([(voc, "trainval")], CLASSES)
