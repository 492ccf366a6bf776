"""CSV files of paths: the images, labels and names of a folder of the same images; refusals."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.sources import synthetic
from pipeline.sources.images import list_images
from pipeline.system.errors import InputError

NAMES = ["b/2.jpg", "a/0.jpg", "b, c/1.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(synthetic.jpeg(0, number))
    return tmp_path


def _write(file: Path, rows: list[list[str]], **options: str) -> str:
    with open(file, "w", newline="", encoding="utf-8-sig") as text:
        csv.writer(text, **options).writerows(rows)  # type: ignore[arg-type]
    return str(file)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_list_gives_the_images_and_labels_of_the_folder(folder: Path, suffix: str) -> None:
    rows = [["path", "label"], *([name, name.split("/")[0]] for name in NAMES)]
    listed = _write(folder / f"images.{suffix}", rows, delimiter="\t" if suffix == "tsv" else ",")
    source, expected = list_images([listed]), list_images([str(folder)])
    assert source.classes == expected.classes
    assert [item.name for item in source.items] == NAMES  # the list's order
    by_name = {item.name: (item.label, item.read()) for item in expected.items}
    assert {item.name: (item.label, item.read()) for item in source.items} == by_name


def test_columns_are_chosen_by_name_and_paths_may_be_absolute(folder: Path) -> None:
    rows = [["n", "file", "kind"], *([str(i), str(folder / name), str(2 - i)] for i, name in enumerate(NAMES))]
    listed = _write(folder / "images.csv", rows)
    out = folder / "x.beton"
    prepare(listed, out, image_column="file", label_column="kind", workers=1, quiet=True)
    beton = Beton(out)
    assert beton.labels.tolist() == [2, 1, 0]
    assert beton.classes == ["0", "1", "2"]


def test_without_a_column_named_label_images_have_none(folder: Path) -> None:
    rows = [["path", "kind"], *([name, "x"] for name in NAMES)]
    assert [item.label for item in list_images([_write(folder / "x.csv", rows)]).items] == [-1, -1, -1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "lists 0 images"),
        ([["path"]], {}, "lists 0 images"),
        (
            [["path"], ["a/0.jpg"], ["a/9.jpg"], ["b/9.jpg"]],
            {},
            "a/9.jpg and 1 more: correct the paths",
        ),
        ([["path", "label"], ["a/0.jpg"]], {}, "row 2: 1 values for 2 columns"),
        ([["path"], ["a/0.jpg"]], {"image_column": "file"}, "--image-column file: .* has path: choose one"),
        ([["path"], ["a/0.jpg"]], {"label_column": "kind"}, "--label-column kind: .* has path: choose one"),
        ([["path", "label"], ["a/0.jpg", "9" * 30]], {}, "row 2 has label 99999999999999999999: give less"),
        ([["path"], ['"a']], {}, "no such file"),
        ([["a/0.jpg", "0"], ["b/2.jpg", "1"]], {}, "its first line is that of an image"),
        ([["path"], ["a/0.jpg"]], {"subset": "a"}, "--subset a: .* has no folders: leave it out"),
    ],
)
def test_wrong_lists_are_refused(folder: Path, rows: list[list[str]], options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(_write(folder / "x.csv", rows), folder / "x.beton", quiet=True, **options)  # type: ignore[arg-type]
    assert not (folder / "x.beton").exists()


def test_a_broken_quotation_is_refused(folder: Path) -> None:
    (folder / "x.csv").write_text('path\n"a/0.jpg\n')
    with pytest.raises(InputError, match="not a table of comma-separated values"):
        list_images([str(folder / "x.csv")])
