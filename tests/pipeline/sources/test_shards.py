"""WebDataset's shards, and several sources in one beton."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.sources import synthetic
from pipeline.sources.images import list_images
from pipeline.system.errors import InputError

IMAGES = [synthetic.jpeg(0, number) for number in range(6)]
Files = dict[str, bytes]


def _tar(path: Path, files: Files) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _shard(numbers: range, **labels: list[bytes]) -> Files:
    """Return the files of a shard: images, and label files of those kinds."""
    files: Files = {}
    for place, number in enumerate(numbers):
        files[f"{number:04d}.jpg"] = IMAGES[number]
        files |= {f"{number:04d}.{kind}": values[place] for kind, values in labels.items()}
    return files


@pytest.mark.parametrize("pattern", ["train-{000..001}.tar", "train-*.tar"])
def test_shards_of_a_pattern_give_their_images_and_labels_in_order(pattern: str, tmp_path: Path) -> None:
    _tar(tmp_path / "train-000.tar", _shard(range(3), cls=[b"2", b"0\n", b"1"]))
    _tar(tmp_path / "train-001.tar", _shard(range(3, 6), cls=[b"1", b"2", b"0"]))
    prepare(str(tmp_path / pattern), tmp_path / "x.beton", workers=1, quiet=True)
    beton = Beton(tmp_path / "x.beton")
    assert beton.labels.tolist() == [2, 0, 1, 1, 2, 0]
    assert beton.classes == ["0", "1", "2"]
    assert [beton.record(i).tobytes() for i in range(6)] == IMAGES


@pytest.mark.parametrize(
    ("files", "key", "expected", "classes"),
    [
        (_shard(range(2), json=[b'{"label": 1}', b'{"label": 0}']), "", [1, 0], ["0", "1"]),
        (_shard(range(2), json=[b'{"label": "dog"}', b'{"label": "cat"}']), "", [1, 0], ["cat", "dog"]),
        (_shard(range(2), json=[b'{"a": 1, "label": 7}', b'{"a": 0, "label": 7}']), "a", [1, 0], ["0", "1"]),
        (_shard(range(2), cls=[b"golden retriever", b"cat"]), "", [1, 0], ["cat", "golden retriever"]),
        (_shard(range(2), json=[b'{"width": 3}', b"{}"]), "", [-1, -1], []),
        ({"1.jpg": IMAGES[0], "1.cls": b"1", "2.jpg": IMAGES[1]}, "", [1, -1], ["0", "1"]),
        ({"a/1.input.jpg": IMAGES[0], "a/1.cls": b"1", "b/1.JPG": IMAGES[1], "b/1.cls": b"0"}, "", [1, 0], ["0", "1"]),
    ],
)
def test_labels_are_those_of_the_sample(
    files: Files, key: str, expected: list[int], classes: list[str], tmp_path: Path
) -> None:
    _tar(tmp_path / "x.tar", files)
    images = list_images([str(tmp_path / "x.tar")], label_column=key)
    assert [item.label for item in images.items] == expected
    assert images.classes == classes
    assert [item.read() for item in images.items] == IMAGES[:2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.jpg": IMAGES[0], "1.png": b"x", "1.cls": b"0"}, r"1 has 2 images \(jpg, png\)"),
        ({"1.jpg": IMAGES[0], "1.json": b"{"}, "1.json: not JSON|1.json.*write the shard again"),
        ({"1.jpg": IMAGES[0], "1.json": json.dumps({"label": [1]}).encode()}, r"1.json: label is \[1\]"),
        ({"1.jpg": IMAGES[0], "1.json": b"[" * 100_000}, "1.json.*write the shard again"),
        ({"1.cls": b"0"}, "no image in it"),
        ({"1.jpg": IMAGES[0], "1.cls": b"9" * 5000}, "1.cls has label 99999999999999999999: give less"),
    ],
)
def test_shards_that_do_not_fit_are_refused_with_the_remedy(files: Files, message: str, tmp_path: Path) -> None:
    _tar(tmp_path / "x.tar", files)
    with pytest.raises(InputError, match=message) as raised:
        list_images([str(tmp_path / "x.tar")])
    assert "\n" not in str(raised.value)


def test_several_sources_are_joined_by_the_names_of_their_classes(tmp_path: Path) -> None:
    for number, (folder, name) in enumerate([("a", "dog"), ("a", "cat"), ("b", "ape"), ("b", "dog")]):
        (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name / "x.jpg").write_bytes(IMAGES[number])
    images = list_images([str(tmp_path / "a"), str(tmp_path / "b")])
    assert images.classes == ["ape", "cat", "dog"]
    assert [images.classes[item.label] for item in images.items] == ["cat", "dog", "ape", "dog"]
    assert [item.read() for item in images.items] == [IMAGES[i] for i in (1, 0, 2, 3)]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.jpg").write_bytes(IMAGES[0])
    images = list_images([str(tmp_path / "a"), str(tmp_path / "flat")])
    assert [item.label for item in images.items] == [0, 1, -1]


def test_shards_that_the_library_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number, data in enumerate(IMAGES):
            writer.write({"__key__": f"{number:06d}", "jpg": data, "cls": number % 3})
    images = list_images([str(tmp_path / "x-{000000..000001}.tar")])
    assert [item.label for item in images.items] == [0, 1, 2, 0, 1, 2]
    assert [item.read() for item in images.items] == IMAGES
