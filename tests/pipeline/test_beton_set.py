"""Tests of several betons as one set, against one beton of the same images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import typeof

from pipeline.backends import BACKENDS
from pipeline.beton import Beton
from pipeline.beton_format import JPEG
from pipeline.beton_set import Betons, Column, part_paths
from pipeline.inspect import verify
from pipeline.loader import Loader
from pipeline.manifest import columns_path, manifest_path
from pipeline.prepare import prepare
from pipeline.sampling.substitutes import Substitutes
from pipeline.storage.decode import check_record, decode, records_of
from pipeline.storage.encode import Settings
from pipeline.storage.in_place import open_data
from pipeline.storage.subset import Subset
from pipeline.system.errors import BadRecords, DamagedRecord, InputError
from pipeline.system.packages import installed
from pipeline.views import AUGMENTATIONS
from tests.pipeline.conftest import pack, picture, saved
from tests.pipeline.loading import BATCH, SIZE, same, take

SIZES = (40, 1, 59)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with whole.beton and its images in part-0.beton to part-2.beton; a third is stored as pixels."""
    folder, first = tmp_path_factory.mktemp("set"), 0
    options = {"settings": Settings(mode="proportion"), "workers": 1, "quiet": True}
    prepare("synthetic:100", folder / "whole.beton", **options)  # type: ignore[arg-type]
    for number, size in enumerate(SIZES):
        prepare(f"synthetic:{first}:{size}", folder / f"part-{number}.beton", **options)  # type: ignore[arg-type]
        first += size
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Beton, Beton]:
    return Beton(folder / "whole.beton"), open_data(folder / "part-*.beton")


def test_a_set_has_the_records_of_its_parts(both: tuple[Beton, Beton]) -> None:
    whole, parts = both
    assert isinstance(parts, Betons)
    assert len(parts) == len(whole) == 100
    assert (parts.classes, parts.in_one_file) == (whole.classes, True)
    assert (parts.longest_side, parts.most_pixels) == (whole.longest_side, whole.most_pixels)
    for index in range(100):
        assert parts.name(index) == whole.name(index)
        start, size = int(parts.pointers[index]), int(parts.sizes[index])
        record = parts.data[start : start + size].tobytes()
        assert record == parts.record(index).tobytes()
        if whole.modes[index] == parts.modes[index] == JPEG:
            assert record == whole.record(index).tobytes()
    assert np.array_equal(decode(parts, 99), decode(Beton(parts.parts[2].path), 58))
    for name in ("heights", "widths", "labels"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
    assert verify(parts, quiet=True) == []
    assert parts.manifest is not None
    assert parts.manifest.mean == pytest.approx(whole.manifest.mean, abs=0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_those_of_one_beton(backend: str, folder: Path, tmp_path: Path) -> None:
    if backend == "dali" and not installed("nvidia.dali"):
        pytest.skip("DALI is not installed")
    options = {"size": SIZE, "batch": BATCH, "workers": 1, "seed": 3, "backend": backend}
    for number, first in enumerate((0, 40, 41)):
        prepare(f"synthetic:{first}:{SIZES[number]}", tmp_path / f"{number}.beton", workers=1, quiet=True)
    prepare("synthetic:100", tmp_path / "whole.beton", workers=1, quiet=True)
    loaders = [
        Loader(open_data(tmp_path / name), AUGMENTATIONS["moco_v2"], **options)  # type: ignore[arg-type]
        for name in ("whole.beton", "{0..2}.beton")
    ]
    expected, batches = (take(loader, 4) for loader in loaders)
    assert same(expected, batches)
    for loader in loaders:
        loader.close()


def test_compiled_code_takes_the_same_types(both: tuple[Beton, Beton]) -> None:
    """Nothing is compiled again for a set."""
    ids = np.array([99, 0, 40, 41])
    whole, parts = (records_of(beton, ids) for beton in both)
    assert typeof(whole) == typeof(parts)


def test_a_column_is_indexed_like_an_array() -> None:
    arrays = [
        np.arange(10, dtype=np.uint16)[::2],
        np.broadcast_to(np.uint16(70), 1),
        np.arange(9, 3, -1, dtype=np.uint16),
    ]
    column, plain = Column(arrays), np.concatenate(arrays)
    chosen: list[object] = [0, -1, 5, slice(3, 9), slice(None, None, -2), slice(4, 4), np.array([11, 0, 5, 5, -3])]
    chosen += [plain > 4, np.array([[1, 2], [6, 7]]), np.array([], np.int64), np.int64(6)]
    for rows in chosen:
        values = column[rows]
        assert np.array_equal(values, plain[rows])  # type: ignore[call-overload]
        assert (values.dtype, np.shape(values)) == (plain.dtype, plain[rows].shape)  # type: ignore[call-overload]
    for rows in (12, -13, np.array([3, 12])):
        with pytest.raises(IndexError):
            column[rows]
    assert np.array_equal(column != 70, plain != 70)
    assert np.array_equal(3 * column.astype(np.int64) * column, 3 * plain.astype(np.int64) * plain)
    assert (column.max(), column.min(), len(column), column.shape) == (70, 0, 12, (12,))
    assert np.unique(column).tolist() == np.unique(plain).tolist()


def _classes(folder: Path, name: str, files: dict[str, int]) -> Path:
    images = {file: saved(picture(seed=seed)) for file, seed in files.items()}
    (folder / name).mkdir()
    prepare(str(pack("tar", images, folder / name)), folder / f"{name}.beton", workers=1, quiet=True)
    return folder / f"{name}.beton"


def test_classes_are_joined_by_name(tmp_path: Path) -> None:
    _classes(tmp_path, "a", {"dog/1.jpg": 1, "cat/2.jpg": 2, "cat/3.jpg": 3})
    _classes(tmp_path, "b", {"eel/4.jpg": 4, "dog/5.jpg": 5, "ant/6.jpg": 6})
    _classes(tmp_path, "c", {"7.jpg": 7})  # without a label
    whole = Beton(_classes(tmp_path, "whole", {"dog/1.jpg": 1, "cat/2.jpg": 2, "eel/4.jpg": 4, "ant/6.jpg": 6}))
    parts = open_data(f"{tmp_path}/a.beton,{tmp_path}/{{b,c}}.beton")
    assert parts.classes == whole.classes == ["ant", "cat", "dog", "eel"]
    labels = {parts.name(index): int(parts.labels[index]) for index in range(len(parts))}
    expected = {"ant/6.jpg": 0, "cat/2.jpg": 1, "cat/3.jpg": 1, "dog/1.jpg": 2, "dog/5.jpg": 2, "eel/4.jpg": 3}
    assert labels == expected | {"7.jpg": -1}
    assert np.asarray(parts.labels).tolist() == [1, 1, 2, 0, 2, 3, -1]
    assert parts.labels.max() == 3
    manifest_path(tmp_path / "b.beton").unlink()
    with pytest.raises(InputError, match=r"b\.beton: has labels without class names, and .*a\.beton has names: write"):
        open_data(tmp_path / "[ab].beton")


def test_the_fingerprint_is_that_of_these_parts_in_this_order(folder: Path) -> None:
    names = [str(folder / f"part-{number}.beton") for number in range(3)]
    prints = [open_data(",".join(chosen)).fingerprint for chosen in (names, names[::-1], names[:2])]
    assert len(set(prints)) == 3
    assert prints[0] == open_data(folder / "part-{0..2}.beton").fingerprint
    assert [text.rsplit("-", 1)[0] for text in prints] == ["3-parts-100", "3-parts-100", "2-parts-41"]
    assert open_data(folder / "whol*.beton").fingerprint == Beton(folder / "whole.beton").fingerprint  # no set


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        ("a.beton", []),
        ("a.beton,b.beton", ["a.beton", "b.beton"]),
        ("x/{a,b}.beton,c.beton", ["x/a.beton", "x/b.beton", "c.beton"]),
        ("{a.beton,b.beton}", ["a.beton", "b.beton"]),
        ("p-{08..10}.beton", ["p-08.beton", "p-09.beton", "p-10.beton"]),
    ],
)
def test_parts_are_named_by_patterns_and_lists(source: str, paths: list[str]) -> None:
    assert part_paths(source) == paths


def test_a_file_whose_name_is_a_pattern_is_no_set(folder: Path, tmp_path: Path) -> None:
    for name in ("a,b.beton", "a[1].beton"):
        shutil.copy(folder / "part-0.beton", tmp_path / name)
        assert type(open_data(tmp_path / name)) is Beton


@pytest.mark.parametrize("fault", ["missing", "forged", "twice", "none"])
def test_wrong_parts_are_refused_by_name(fault: str, folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        shutil.copy(folder / f"part-{2 * number}.beton", tmp_path / f"{number}.beton")
    source, message = f"{tmp_path}/{{0..1}}.beton", ""
    if fault == "missing":
        source, message = f"{tmp_path}/{{0..2}}.beton", r"/2\.beton: no such file: write it with"
    elif fault == "forged":
        data = (tmp_path / "1.beton").read_bytes()
        (tmp_path / "1.beton").write_bytes(data[:-24])
        message = r"/1\.beton: sample 58 has a pointer that its allocation table does not list"
    elif fault == "twice":
        (tmp_path / "2.beton").symlink_to("0.beton")
        source, message = f"{tmp_path}/*.beton", r"names .*2\.beton twice: name each part once"
    else:
        source, message = f"{tmp_path}/x-*.beton", "no such files: correct the pattern"
    with pytest.raises(InputError, match=message) as caught:
        open_data(source)
    assert "\n" not in str(caught.value)
    if fault == "twice":
        with pytest.raises(InputError, match=r"/0\.beton twice"):
            open_data(f"{tmp_path}/0.beton,{tmp_path}/0.beton")


def test_damaged_records_are_named_by_their_part(folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        for path in folder.glob(f"part-{number}.beton*"):
            shutil.copy(path, tmp_path / path.name)
    part = Beton(tmp_path / "part-2.beton")
    data = bytearray(part.path.read_bytes())
    data[int(part.pointers[7]) + 30] ^= 0xFF
    part.path.write_bytes(data)
    parts = open_data(tmp_path / "part-*.beton")
    assert [index for index, _ in verify(parts, quiet=True)] == [48]
    loader = Loader(parts, AUGMENTATIONS["moco_v2"], size=SIZE, batch=100, workers=1)
    message = (
        r"part-2\.beton: sample 7 \(drawn/00000048\.jpg\) is damaged: .* pipeline\.inspect .*part-2\.beton --verify"
    )
    with pytest.raises(DamagedRecord, match=message) as caught:
        take(loader, 1)
    loader.close()
    assert caught.value.samples == (48,)
    skipping = Loader(parts, AUGMENTATIONS["moco_v2"], size=SIZE, batch=100, workers=1, on_bad="skip")
    (batch,) = take(skipping, 1)
    skipping.close()
    assert (batch.substituted, 48 in batch.ids, sorted(batch.ids).count(49)) == (1, False, 2)
    subset = Subset(parts, np.array([3, 48]))
    assert subset.place(1) == (tmp_path / "part-2.beton", 7)
    assert check_record(subset, 0) is None
    assert check_record(subset, 1)


def test_unreadable_records_of_parts_are_those_of_the_set(folder: Path, tmp_path: Path) -> None:
    for number in (0, 2):
        shutil.copy(folder / f"part-{number}.beton", tmp_path / f"{number}.beton")
    data = (tmp_path / "2.beton").read_bytes()
    (tmp_path / "2.beton").write_bytes(data[:-24])
    with pytest.raises(BadRecords):
        open_data(tmp_path / "{0,2}.beton")
    parts = open_data(tmp_path / "{0,2}.beton", tolerate=True)
    assert parts.unreadable == {98}
    assert (int(parts.heights[98]), int(parts.sizes[98])) == (1, 1)
    assert Substitutes(parts, "skip").resolve(np.array([98, 97])).tolist() == [0, 97]


def test_without_a_manifest_of_each_part_no_crc_is_checked(folder: Path, tmp_path: Path) -> None:
    for number in (0, 2):
        for path in folder.glob(f"part-{number}.beton*"):
            shutil.copy(path, tmp_path / path.name)
    manifest = manifest_path(tmp_path / "part-2.beton")
    manifest.unlink()
    columns_path(manifest).unlink()
    for part in tmp_path.glob("*.json"):  # classes without names, then, on both sides
        part.unlink()
    parts = open_data(tmp_path / "part-*.beton")
    assert (parts.crc32, parts.manifest, parts.classes, parts.name(45)) == (None, None, [], "number 5")
    assert torch.from_numpy(np.asarray(parts.labels)).max() == 9
