"""Tests of labels from a list."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipeline import prepare
from pipeline.beton import Beton
from pipeline.sources import synthetic
from pipeline.sources.archives import Item, Source
from pipeline.sources.labels import relabel
from pipeline.system.errors import InputError
from tests.pipeline.conftest import run_command

NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 7)]
CLASSES = ["n01440764", "n01443537", "n01484850"]
KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"{name.removesuffix('.JPEG')},{CLASSES[2 - i % 3]} 1 2 30 40 {CLASSES[0]} 5 6 70 80\n"
    for i, name in enumerate(NAMES)
)
CAFFE = "".join(f"{name} {2 - i % 3}\n" for i, name in enumerate(NAMES))


def _source(names: list[str] = NAMES) -> Source:
    return Source([Item(name, "file") for name in names], [])


def _labels(source: Source) -> list[int]:
    return [item.label for item in source.items]


def test_kaggles_list_of_the_validation_images_labels_them(tmp_path: Path) -> None:
    (tmp_path / "LOC_val_solution.csv").write_text(KAGGLE)
    relabeled = relabel(_source(), tmp_path / "LOC_val_solution.csv")
    assert (relabeled.classes, _labels(relabeled)) == (CLASSES, [2, 1, 0, 2, 1, 0])
    assert [item.name for item in relabeled.items] == NAMES


def test_a_list_of_numbers_takes_names_from_other_classes(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text(CAFFE)
    relabeled = relabel(_source(), tmp_path / "val.txt", CLASSES)
    assert (relabeled.classes, _labels(relabeled)) == (CLASSES, [2, 1, 0, 2, 1, 0])


def test_numeric_classes_are_sorted_by_number(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("a.png 10\nb.png 9\nc.png 100\n")
    relabeled = relabel(_source(["a.png", "b.png", "c.png"]), tmp_path / "val.txt")
    assert (relabeled.classes, _labels(relabeled)) == (["9", "10", "100"], [1, 0, 2])


def test_classes_of_another_beton_retain_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("a.png n3\nb.png n1\n")
    relabeled = relabel(_source(["x/a.png", "b.png"]), tmp_path / "l", ["n0", "n1", "n2", "n3"])
    assert (relabeled.classes, _labels(relabeled)) == (["n0", "n1", "n2", "n3"], [3, 1])


def test_a_class_whose_name_is_a_number_is_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("a.png 1\n")
    assert _labels(relabel(_source(["a.png"]), tmp_path / "l", ["1", "0"])) == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png 0\n", "b.png is not in it"),
        ("a.png 0\nb.png\n", "line 2: 'b.png' names no class"),
        ("a.png 0\nb.png 1\na.png 1\n", "line 3: a.png has two classes"),
        ("a.png 0\nb.png 3\n", "class 3 of b.png is none of the 3, such as n01440764"),
        ("a.png 0\nb.png -1\n", "class -1 of b.png"),
        ("", "a.png and 1 others are not in it"),
    ],
)
def test_a_mismatched_list_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "l").write_text(text)
    with pytest.raises(InputError, match=message):
        relabel(_source(["a.png", "b.png"]), tmp_path / "l", CLASSES)


def test_the_command_labels_a_flat_tar_as_another_beton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for number, name in enumerate(NAMES):
            data = synthetic.jpeg(0, number)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for label in CLASSES:
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "x.jpg").write_bytes(synthetic.jpeg(0, 9))
    prepare.prepare(str(tmp_path / "train"), tmp_path / "train.beton", workers=1, quiet=True)
    (tmp_path / "val.txt").write_text(CAFFE)
    options = ["--labels", str(tmp_path / "val.txt"), "--classes-of", str(tmp_path / "train.beton"), "--workers", "1"]
    call = [str(tmp_path / "val.tar"), str(tmp_path / "val.beton"), *options, "--limit", "5"]
    assert run_command(prepare.main, monkeypatch, *call) == 0
    captured = capsys.readouterr()
    assert "5 images, 3 classes" in captured.out
    assert "no label" not in captured.err
    beton = Beton(tmp_path / "val.beton")
    assert beton.classes == CLASSES == Beton(tmp_path / "train.beton").classes
    assert beton.labels.tolist() == [2, 1, 0, 2, 1]


def test_classes_of_another_beton_need_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["synthetic:4", str(tmp_path / "a.beton"), "--classes-of", "b.beton"]
    assert run_command(prepare.main, monkeypatch, *call) == 2
    assert "it needs --labels" in capsys.readouterr().err
