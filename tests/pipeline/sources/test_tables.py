"""Parquet files and saved data sets: the same images, labels, names and order as a folder's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.sources import synthetic
from pipeline.sources.images import list_images
from pipeline.system.errors import InputError

CLASSES = ["wolf", "cat", "dog"]  # not in sorted order: the data set's own
IMAGES = [synthetic.jpeg(0, number) for number in range(7)]
LABELS = [2, 0, 1, 1, 2, 0, 0]


def _schema(**features: Any) -> dict[bytes, bytes]:
    """Return a schema's metadata as `datasets` writes it."""
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def _table(images: list[bytes], labels: list[Any], label: str = "label", **more: list[Any]) -> pa.Table:
    rows = [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(images)]
    features = {"image": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": CLASSES}}
    return pa.table({"image": rows, label: labels, **more}).replace_schema_metadata(_schema(**features))


def _parquet(folder: Path) -> str:
    """Write two shards, with row groups of two images."""
    for number, part in enumerate((slice(0, 4), slice(4, 7))):
        table = _table(IMAGES[part], LABELS[part])
        parquet.write_table(table, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=2)
    return str(folder / "train-*.parquet")


def _saved(folder: Path) -> str:
    """Write what `Dataset.save_to_disk` writes: Arrow streams and the list of them."""
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (slice(0, 4), slice(4, 7)), strict=True):
        table = _table(IMAGES[part], LABELS[part])
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize("write", [_parquet, _saved])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_beton_equals_that_of_a_folder(write: Callable[[Path], str], workers: int, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    prepare(write(tmp_path / "tables"), tmp_path / "a.beton", workers=workers, quiet=True)
    for number, (data, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        place = tmp_path / "images" / f"{number}-{CLASSES[label]}"
        place.mkdir(parents=True)
        (place / "x.jpg").write_bytes(data)
    prepare(str(tmp_path / "images"), tmp_path / "b.beton", workers=1, quiet=True)
    ours, folder = Beton(tmp_path / "a.beton"), Beton(tmp_path / "b.beton")
    assert ours.classes == CLASSES
    assert ours.labels.tolist() == LABELS
    assert [ours.record(i).tobytes() for i in range(7)] == [folder.record(i).tobytes() for i in range(7)] == IMAGES


def test_names_say_file_and_row(tmp_path: Path) -> None:
    names = [item.name for item in list_images([_parquet(tmp_path)]).items]
    assert names[0] == "train-00000-of-00002.parquet/00000000"
    assert names[-1] == "train-00001-of-00002.parquet/00000006"
    assert names == sorted(names)


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    """As in CIFAR-100's two labels."""
    table = _table(IMAGES, LABELS, "fine", coarse=[0] * 7)
    metadata = _schema(**{name: {"_type": "ClassLabel", "names": CLASSES} for name in ("fine", "coarse")})
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="has class labels in fine, coarse: choose one with --label-column"):
        list_images([str(tmp_path / "x.parquet")])
    images = list_images([str(tmp_path / "x.parquet")], label_column="fine", image_column="image")
    assert [item.label for item in images.items] == LABELS


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        ([2, 0, 2], [2, 0, 2], ["0", "1", "2"]),
        ([-1, -1, -1], [-1, -1, -1], []),
        (None, [-1, -1, -1], []),
    ],
)
def test_labels_may_be_texts_numbers_or_none(
    labels: list[Any] | None, expected: list[int], classes: list[str], tmp_path: Path
) -> None:
    columns: dict[str, list[Any]] = {"img": IMAGES[:3]}
    parquet.write_table(pa.table(columns | ({"label": labels} if labels else {})), tmp_path / "x.parquet")
    images = list_images([str(tmp_path / "x.parquet")])
    assert [item.label for item in images.items] == expected
    assert images.classes == classes
    assert [item.read() for item in images.items] == IMAGES[:3]


def _write(folder: Path, table: pa.Table) -> str:
    parquet.write_table(table, folder / "x.parquet")
    return str(folder / "x.parquet")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda f: _write(f, pa.table({"text": ["a"]})), {}, "has images in 0 columns"),
        (
            lambda f: _write(f, pa.table({"a": [b"x"], "b": [b"y"]})),
            {},
            r"2 columns \(a, b\): choose one with --image-c",
        ),
        (lambda f: _write(f, _table(IMAGES, LABELS)), {"image_column": "img"}, "has images in image: choose one"),
        (lambda f: _write(f, _table(IMAGES, LABELS)), {"label_column": "labels"}, "has the columns image, label"),
        (lambda f: _write(f, _table(IMAGES, [9] * 7)), {}, "column label has 9"),
        (lambda f: _write(f, _table(IMAGES, LABELS).slice(0, 0)), {}, "no image in it"),
        (lambda f: str((f / "x.parquet").write_bytes(b"PAR1" * 9) and f / "x.parquet"), {}, "not an intact table"),
        (lambda f: str(f / "gone-*.parquet"), {}, "no such files"),
        (lambda f: str(f / "gone.parquet"), {}, "no such file"),
        (lambda f: str(f), {"label_column": "x"}, "--label-column: .* has no columns"),
    ],
)
def test_tables_that_do_not_fit_are_refused_with_the_remedy(
    make: Callable[[Path], str], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        list_images([make(tmp_path)], **options)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_rows_without_bytes_are_unreadable_images(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": IMAGES[0], "path": "a"}, {"bytes": None, "path": "/elsewhere/b.jpg"}]})
    source = _write(tmp_path, table)
    with pytest.raises(InputError, match="its row has no bytes: save the data set with its images embedded"):
        prepare(source, tmp_path / "x.beton", workers=1, quiet=True)
    assert len(prepare(source, tmp_path / "x.beton", workers=1, quiet=True, skip_bad=1).skipped) == 1


def test_without_pyarrow_the_message_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.tables.installed", lambda name: False)
    with pytest.raises(InputError, match="needs pyarrow: pip install pyarrow"):
        list_images([_parquet(tmp_path)])


def test_a_data_set_that_the_library_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": [{"bytes": data, "path": None} for data in IMAGES], "label": LABELS}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    saved.to_parquet(str(tmp_path / "x.parquet"))
    for source in (tmp_path / "saved", tmp_path / "x.parquet"):
        images = list_images([str(source)])
        assert images.classes == CLASSES
        assert [item.label for item in images.items] == LABELS
        assert [item.read() for item in images.items] == IMAGES


def test_png_images_are_encoded_like_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.png").write_bytes(out.getvalue())
    source = _write(tmp_path, pa.table({"image": [out.getvalue()]}))
    records = []
    for number, each in enumerate((source, str(tmp_path / "folder"))):
        prepare(each, tmp_path / f"{number}.beton", workers=1, quiet=True)
        records.append(Beton(tmp_path / f"{number}.beton").record(0).tobytes())
    assert records[0] == records[1]
