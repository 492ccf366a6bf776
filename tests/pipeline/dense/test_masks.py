"""Tests of images with masks: both layouts, and invalid files, which are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dense.masks import classes_in, open_masked
from pipeline.dense.scenes import scene, write
from pipeline.system.errors import InputError
from pipeline.system.thread_pool import Workers


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in VOC's layout, four for training and two for testing. Copy them before a change."""
    folder = tmp_path_factory.mktemp("scenes") / "voc"
    write(folder, 4, 2, size=64)
    return folder


@pytest.fixture
def voc(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the scenes."""
    return Path(shutil.copytree(drawn, tmp_path / "voc"))


@pytest.fixture
def workers() -> Iterator[Workers]:
    pool = Workers(2, lambda: None)
    yield pool
    pool.close()


def _as_folders(voc: Path) -> Path:
    """Return the same images as two folders, masks as gray levels."""
    (voc / "JPEGImages").rename(voc / "images")
    (voc / "masks").mkdir()
    for file in (voc / "SegmentationClass").iterdir():
        Image.fromarray(np.asarray(Image.open(file))).save(voc / "masks" / file.name)
    return voc


def test_both_layouts_give_the_images_and_their_masks(voc: Path, workers: Workers) -> None:
    train = open_masked(voc)
    assert (len(train), train.shapes.tolist()) == (4, [[64, 64]] * 4)
    image, mask = train.read(2)
    assert image.mode == "RGB"
    assert (mask == scene(0, 2, 64).mask).all()
    numbers = {number for index in range(4) for number in np.unique(scene(0, index, 64).mask)} - {255}
    assert classes_in(train, range(4), 0, workers) == numbers
    assert open_masked(voc, "val").fingerprint != train.fingerprint
    folders = open_masked(_as_folders(voc))
    assert len(folders) == 6
    assert (folders.mask(2) == mask).all()
    rest, tenth = folders.held_out()
    assert [file.stem for file in tenth.images] == ["000001"]
    assert [file.stem for file in rest.images] == [f"{number:06d}" for number in range(2, 7)]
    assert [len(part) for part in folders.part([0] * 95).held_out()] == [85, 10]
    assert len({rest.fingerprint, tenth.fingerprint, folders.fingerprint}) == 3


def test_lines_of_two_paths_are_read(voc: Path) -> None:
    (voc / "SegmentationClass").rename(voc / "SegmentationClassAug")
    lines = "/JPEGImages/000002.jpg /SegmentationClassAug/000002.png\n"
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").write_text(lines)
    assert open_masked(voc, "train_aug", "SegmentationClassAug").images == (voc / "JPEGImages" / "000002.jpg",)


def _resized(voc: Path) -> None:
    path = voc / "SegmentationClass" / "000002.png"
    Image.open(path).resize((64, 60), Image.Resampling.NEAREST).save(path)


def _colored(voc: Path) -> None:
    path = voc / "SegmentationClass" / "000002.png"
    Image.open(path).convert("RGB").save(path)


def _junk(voc: Path) -> None:
    (voc / "JPEGImages" / "000002.jpg").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_resized, r"000002.png: 64 x 60 pixels, but .*000002.jpg has 64 x 64: give the mask that was drawn on it"),
        (_colored, r"000002.png: is RGB, not class numbers: save it as"),
        (_junk, r"000002.jpg: cannot be read .*: replace it"),
        (lambda voc: (voc / "SegmentationClass" / "000003.png").unlink(), r"000003.png: is missing, and 0 other"),
        (lambda voc: (voc / "ImageSets/Segmentation/train.txt").unlink(), r"the sets are val: name one"),
        (lambda voc: (voc / "ImageSets/Segmentation/train.txt").write_text("\n"), r"train.txt: names no image"),
        (lambda voc: (voc / "JPEGImages").rename(voc / "pictures"), r"neither VOC's layout .* nor folders images"),
    ],
)
def test_mismatched_images_and_masks_are_named(spoil: Callable[[Path], None], message: str, voc: Path) -> None:
    spoil(voc)
    with pytest.raises(InputError, match=message):
        open_masked(voc)


@pytest.mark.parametrize(("folder", "other"), [("images", "masks"), ("masks", "images")])
def test_a_file_without_its_counterpart_is_refused(folder: str, other: str, voc: Path) -> None:
    next((_as_folders(voc) / other).glob("000003.*")).unlink()
    with pytest.raises(InputError, match=rf"{folder}/000003\.\w+: has no counterpart in .*{other}, like 0 others"):
        open_masked(voc)


def test_two_images_of_one_name_are_refused(voc: Path) -> None:
    image = _as_folders(voc) / "images" / "000003.jpg"
    Image.open(image).save(image.with_suffix(".png"))
    with pytest.raises(InputError, match=r"000003.png: has the name of .*000003.jpg"):
        open_masked(voc)


def test_class_numbers_out_of_range_and_damaged_masks_are_found(voc: Path, workers: Workers) -> None:
    data, path = open_masked(voc), voc / "SegmentationClass" / "000003.png"
    with pytest.raises(InputError, match=r"\.png: has class \d+, and there are 2, 0 to 1, except 255"):
        classes_in(data, range(4), 2, workers)
    content = path.read_bytes()
    path.write_bytes(content[:-60])
    with pytest.raises(InputError, match=r"000003.png: cannot be decoded"):
        classes_in(open_masked(voc), range(4), 0, workers)
