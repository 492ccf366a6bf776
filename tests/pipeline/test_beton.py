"""Tests of reading betons: truncated, forged and foreign files, and mismatched manifests."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.beton import Beton, Manifest, manifest_path
from pipeline.beton_format import JPEG, RAW
from pipeline.native import libffcv
from pipeline.prepare import prepare
from pipeline.storage.decode import check_record, decode
from pipeline.storage.encode import Settings, encode
from pipeline.storage.writer import BetonWriter
from pipeline.system.errors import InputError
from tests.pipeline.conftest import picture, saved

HEADER = struct.Struct("<HHIQQ")  # version, fields, page size, samples, allocation table
FIELD, ROW = 1041, struct.Struct("<BHHQ3xq")  # field: type, name, arguments; row: mode, width, height, pointer, label
ROWS = HEADER.size + 2 * FIELD
ENTRY = struct.Struct("<QQQ")  # sample, pointer, size
MAX_BYTES = 64 << 20  # of memory for opening and checking a small file


def _opens(path: Path) -> None:
    """Open the file and check every record. Raises InputError if it is refused, and nothing else."""
    beton = Beton(path)
    for index in range(len(beton)):
        start, size = int(beton.pointers[index]), int(beton.sizes[index])
        assert 0 < start < start + size <= path.stat().st_size
        assert beton.record(index).size == size
        check_record(beton, index)


def _set(path: Path, offset: int, value: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(value)


def _row(path: Path, index: int, **changes: int) -> None:
    """Change a sample's row."""
    names = ("mode", "width", "height", "pointer", "label")
    at = ROWS + index * ROW.size
    values = dict(zip(names, ROW.unpack_from(path.read_bytes(), at), strict=True)) | changes
    _set(path, at, ROW.pack(*values.values()))


def _table(path: Path) -> int:
    return int(HEADER.unpack_from(path.read_bytes())[4])


def _entry(path: Path, index: int, **changes: int) -> None:
    """Change a sample's entry in the allocation table."""
    at = _table(path) + index * ENTRY.size
    values = dict(zip(("sample", "pointer", "size"), ENTRY.unpack_from(path.read_bytes(), at), strict=True)) | changes
    _set(path, at, ENTRY.pack(*values.values()))


def _pointer(path: Path, index: int, value: int) -> None:
    """Change a sample's pointer, in its row and in the table."""
    _row(path, index, pointer=value)
    _entry(path, index, pointer=value)


def _first(path: Path, mode: int) -> int:
    return Beton(path).modes.tolist().index(mode)


@pytest.fixture
def _memory() -> Iterator[None]:
    """Fail a test that allocates much memory at any time."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_BYTES


def test_a_beton_has_the_prepared_images(small: Path) -> None:
    beton = Beton(small)
    assert len(beton) == 8
    assert beton.classes == ["a", "b"]
    assert beton.labels.tolist() == [0] * 4 + [1] * 4
    assert [beton.name(index) for index in range(8)] == [f"{'ab'[i % 2]}/{i}.jpg" for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    numbers = [0, 2, 4, 6, 1, 3, 5, 7]
    assert beton.widths.tolist() == [20 + 3 * i for i in numbers]
    assert beton.heights.tolist() == [30 - 2 * i for i in numbers]
    assert beton.longest_side == 41
    assert set(beton.modes.tolist()) == {JPEG, RAW}


def test_a_beton_without_manifest_has_numbers_for_names(bare: Path) -> None:
    beton = Beton(bare)
    assert (beton.manifest, beton.crc32, beton.classes, beton.name(3)) == (None, None, [], "number 3")
    _opens(bare)


def test_a_fingerprint_identifies_its_file(small: Path, bare: Path, tmp_path: Path) -> None:
    first = Beton(bare).fingerprint
    assert Beton(bare).fingerprint == first
    _row(bare, 0, label=5)
    assert Beton(bare).fingerprint != first


# ---- other files ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such file: write it with python -m pipeline.prepare"),
        (b"", "ends before its header: not an intact beton"),
        (b"\x02", "ends before its header: not an intact beton"),
        (np.random.default_rng(0).bytes(5000), "not an intact beton"),
        (bytes(5000), "not an intact beton"),
        (b"\xff" * 5000, "not an intact beton"),
        (saved(picture(300, 300)), "not an intact beton"),
    ],
    ids=["missing", "empty", "one byte", "random", "zeros", "ones", "a JPEG"],
)
@pytest.mark.usefixtures("_memory")
def test_other_files_are_refused_by_name(data: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=rf"x\.beton: .*{message}"):
        Beton(path)


def test_a_folder_is_no_beton(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        Beton(tmp_path)


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.usefixtures("_memory")
def test_a_beton_cut_at_any_length_is_refused(manifest: bool, small: Path) -> None:
    if not manifest:
        manifest_path(small).unlink()
    data = small.read_bytes()
    structure = [0, 1, HEADER.size, ROWS, ROWS + 1, ROWS + 8 * ROW.size, _table(small)]
    ends = [len(data) - n for n in (1, 2, 8, ENTRY.size, 2 * ENTRY.size)]
    lengths = {*structure, *ends, *range(0, len(data), len(data) // 50)}
    assert len(lengths) >= 60
    for length in lengths:
        small.write_bytes(data[:length])
        with pytest.raises(InputError):
            Beton(small)


def test_bytes_added_at_the_end_are_refused(bare: Path) -> None:
    bare.write_bytes(bare.read_bytes() + b"more")
    with pytest.raises(InputError, match="allocation table is not where the header says"):
        Beton(bare)


# ---- forged betons ----

BIG = 2**64 - 1


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (0, "<H", 1, "format version 2"),
        (0, "<H", 3, "format version 2"),
        (2, "<H", 0, "format version 2"),
        (2, "<H", 65535, "format version 2"),
        (2, "<H", 1, "not an intact beton"),
        (2, "<H", 64, "not an intact beton"),
        (8, "<Q", 0, "it has no sample"),
        (8, "<Q", BIG, "ends before its metadata"),
        (8, "<Q", 2**60, "ends before its metadata"),
        (8, "<Q", 9, "not an intact beton"),
        (16, "<Q", 0, "allocation table is not where"),
        (16, "<Q", ROWS, "allocation table is not where"),
        (16, "<Q", 2**40, "allocation table is not where"),
        (16, "<Q", BIG, "allocation table is not where"),
        (HEADER.size, "<B", 255, "field of an unknown type"),
        (HEADER.size, "<B", 77, "field of an unknown type"),
        (HEADER.size, "<B", 1, "it has no image field"),
        (HEADER.size, "<B", 4, "no image field"),
        (HEADER.size + FIELD, "<B", 3, "not an intact beton"),
    ],
)
@pytest.mark.usefixtures("_memory")
def test_a_forged_header_is_refused(offset: int, kind: str, value: int, message: str, bare: Path) -> None:
    _set(bare, offset, struct.pack(kind, value))
    with pytest.raises(InputError, match=message):
        Beton(bare)


def _first_raw(change: Callable[[Path, int], None]) -> Callable[[Path], None]:
    return lambda path: change(path, _first(path, RAW))


def _first_jpeg(change: Callable[[Path, int], None]) -> Callable[[Path], None]:
    return lambda path: change(path, _first(path, JPEG))


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda path: _row(path, 3, pointer=ROWS + 999), "sample 3 has a pointer that its allocation table does not"),
        (lambda path: _row(path, 3, pointer=BIG), "sample 3 has a pointer that its allocation table does not"),
        (lambda path: _entry(path, 2, pointer=0), "sample 2 has a pointer that its allocation table does not"),
        (lambda path: _pointer(path, 4, 0), "sample 4 has a record outside the file"),
        (lambda path: _pointer(path, 4, ROWS + 8 * ROW.size - 1), "sample 4 has a record outside the file"),
        (lambda path: _pointer(path, 4, 2**63), "sample 4 has a record outside the file"),
        (lambda path: _pointer(path, 4, BIG), "sample 4 has a record outside the file"),
        (lambda path: _pointer(path, 4, _table(path)), "sample 4 has a record outside the file"),
        (lambda path: _entry(path, 7, size=2**40), "sample 7 has a record outside the file"),
        (lambda path: _entry(path, 7, size=BIG), "sample 7 has a record outside the file"),
        (lambda path: _entry(path, 7, size=0), "sample 7 has an empty record"),
        (lambda path: _row(path, 5, height=0), "sample 5 has an image of no pixels"),
        (lambda path: _row(path, 5, width=0), "sample 5 has an image of no pixels"),
        (lambda path: _row(path, 1, mode=2), "sample 1 has an unknown storage mode"),
        (_first_raw(lambda path, i: _row(path, i, height=65535)), "a raw record whose size is not that of its image"),
        (_first_raw(lambda path, i: _entry(path, i, size=3)), "a raw record whose size is not that of its image"),
        (_first_jpeg(lambda path, i: _row(path, i, height=65535, width=65535)), "a JPEG too short for its image"),
        (_first_jpeg(lambda path, i: _row(path, i, mode=RAW)), "a raw record whose size is not that of its image"),
    ],
)
@pytest.mark.usefixtures("_memory")
def test_a_forged_sample_is_refused_with_its_number(forge: Callable[[Path], None], message: str, bare: Path) -> None:
    forge(bare)
    with pytest.raises(InputError, match=message):
        Beton(bare)


@pytest.mark.parametrize(("change", "value"), [("height", 1), ("width", 64)])
def test_a_jpeg_of_other_dimensions_than_its_row_is_damaged(change: str, value: int, bare: Path) -> None:
    index = _first(bare, JPEG)
    _row(bare, index, **{change: value})
    beton = Beton(bare)
    assert check_record(beton, index) == "its JPEG does not decode, or not to the stored height and width"
    with pytest.raises(InputError, match=rf"sample {index} .number {index}. is damaged"):
        decode(beton, index)


@pytest.mark.usefixtures("_memory")
def test_random_changes_are_refused_or_leave_every_record_inside_the_file(bare: Path) -> None:
    data, rng = bare.read_bytes(), np.random.default_rng(5)
    structure = [*range(HEADER.size), HEADER.size, HEADER.size + FIELD, *range(ROWS, ROWS + 8 * ROW.size)]
    structure += range(_table(bare), len(data))
    words = np.array([0, 1, 255, 2**15, 2**31, 2**32 - 1, 2**63, BIG, len(data)], dtype=np.uint64)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        at = int(rng.choice(structure))
        if rng.random() < 0.5:
            changed[at] ^= int(rng.integers(1, 256))
        else:
            word = rng.choice(words).tobytes()[: int(rng.choice([2, 4, 8]))]
            changed[at : at + len(word)] = word
        bare.write_bytes(changed[: len(data)])
        try:
            _opens(bare)
        except InputError:
            refused += 1
    assert 100 < refused < 300


@pytest.mark.usefixtures("_memory")
def test_random_changes_to_jpegs_do_not_crash_decoding(bare: Path) -> None:
    data, rng, beton = bare.read_bytes(), np.random.default_rng(6), Beton(bare)
    index = _first(bare, JPEG)
    start, size = int(beton.pointers[index]), int(beton.sizes[index])
    damaged = 0
    for _ in range(200):
        changed = bytearray(data)
        for at in rng.integers(start, start + size, int(rng.integers(1, 6))):
            changed[at] = int(rng.choice([0, 1, 0x7F, 0xFF, int(rng.integers(256))]))
        bare.write_bytes(changed)
        damaged += check_record(Beton(bare), index) is not None
    assert damaged > 50


@pytest.mark.parametrize(
    "options", [{"quality": 1}, {"quality": 1, "progressive": True}, {"quality": 1, "optimize": True}]
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_smallest_jpegs_are_accepted(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = saved(Image.new(mode, (3000, 3000), "gray"), **options)
    writer = BetonWriter(tmp_path / "x.beton", 1)
    writer.append(encode(data, 0, Settings(max_side=0)), 0)
    writer.close()
    assert Beton(tmp_path / "x.beton").record(0).tobytes() == data
    _opens(tmp_path / "x.beton")


# ---- manifests ----


def _change_manifest(beton: Path, **changes: object) -> None:
    path = manifest_path(beton)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "manifest format 2, this version reads 1: write it again"),
        ({"format": None}, "manifest format None"),
        ({"count": 7}, "must list 7 values"),
        ({"count": 7, "crc32": [0] * 7, "names": ["x"] * 7}, "has 8 samples in .* its manifest .* says 7"),
        ({"count": "8"}, "must be integers"),
        ({"count": 8.0}, "must be integers"),
        ({"count": None}, "must be integers"),
        ({"file_size": 10}, "its manifest .* says 8 in 10"),
        ({"header_crc32": 1}, "header or metadata do not match its manifest"),
        ({"header_crc32": True}, "must be integers"),
        ({"crc32": [0] * 7}, "crc32 must list 8 values of type int"),
        ({"crc32": [0.5] * 8}, "crc32 must list 8 values of type int"),
        ({"crc32": [-1] * 8}, "outside 32 bits"),
        ({"crc32": [2**32] * 8}, "outside 32 bits"),
        ({"crc32": {"0": 1}}, "crc32 must list 8 values of type int"),
        ({"names": [1] * 8}, "names must list 8 values of type str"),
        ({"names": "12345678"}, "names must list 8 values of type str"),
        ({"classes": "ab"}, "classes must be a list of names"),
        ({"classes": [1, 2]}, "classes must be a list of names"),
        ({"settings": []}, "settings and versions must be objects"),
        ({"versions": "1"}, "settings and versions must be objects"),
        ({"skipped": [["name"]]}, "skipped must list pairs"),
        ({"skipped": 3}, "skipped must list pairs"),
        ({"mean": 0.5}, "mean and std must list three numbers"),
        ({"mean": [0.5, 0.5, 1]}, "mean and std must list three numbers"),
        ({"std": [0.5, 0.5]}, "mean and std must list three numbers"),
        ({"extra": 1}, "not a manifest"),
    ],
)
def test_a_mismatched_manifest_is_refused(changes: dict[str, object], message: str, small: Path) -> None:
    _change_manifest(small, **changes)
    with pytest.raises(InputError, match=message) as error:
        Beton(small)
    assert "small.beton" in str(error.value)
    assert "python -m pipeline.prepare" in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"not JSON", b"\xff\xfe\x00", b"[1, 2]", b"null", b"{}", b'{"count": 8}', b'{"count": 8', b"[" * 100_000],
)
def test_other_manifest_files_are_refused_with_the_remedy(data: bytes, small: Path) -> None:
    manifest_path(small).write_bytes(data)
    with pytest.raises(InputError, match=r"json: not (a manifest|valid JSON|text) .*: write it again .*, or delete"):
        Beton(small)


def test_another_betons_manifest_is_refused(small: Path, tmp_path: Path) -> None:
    prepare("synthetic:8", tmp_path / "other.beton", workers=1, quiet=True)
    manifest_path(tmp_path / "other.beton").replace(manifest_path(small))
    with pytest.raises(InputError, match=r"its manifest small\.beton\.json says 8 in"):
        Beton(small)


@pytest.mark.parametrize("change", [lambda path: _row(path, 2, label=1), lambda path: _entry(path, 2, sample=5)])
def test_changed_metadata_is_found_by_the_manifest(change: Callable[[Path], None], small: Path) -> None:
    change(small)
    with pytest.raises(InputError, match="header or metadata do not match"):
        Beton(small)


def test_a_manifest_round_trips(small: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(manifest_path(small), 8)
    manifest.skipped = [["größe.jpg", "the file is empty"]]
    manifest.names[0] = b"caf\xe9".decode("utf-8", "surrogateescape")
    manifest.write(tmp_path / "copy.json")
    assert Manifest.read(tmp_path / "copy.json", 8) == manifest


# ---- betons written by FFCV ----


@pytest.fixture
def _thread_counts() -> Iterator[None]:
    counts = torch.get_num_threads(), numba.get_num_threads()
    yield
    torch.set_num_threads(counts[0])
    numba.set_num_threads(counts[1])


@pytest.mark.usefixtures("_thread_counts")
@pytest.mark.parametrize(("mode", "number"), [("jpg", JPEG), ("raw", RAW)])
@pytest.mark.parametrize("labeled", [True, False])
def test_a_beton_written_by_ffcv_opens_and_decodes(mode: str, number: int, labeled: bool, tmp_path: Path) -> None:
    assert libffcv  # imported before ffcv: it restores the number of threads
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = [np.asarray(picture(24 + i, 40 - 3 * i, i)) for i in range(5)]
    label = {"label": IntField()} if labeled else {}
    dataset = [(image, 7 - i) if labeled else (image,) for i, image in enumerate(images)]
    path = tmp_path / "theirs.beton"
    fields = (
        {**label, "image": RGBImageField(write_mode=mode)}
        if not labeled
        else {"image": RGBImageField(write_mode=mode), **label}
    )
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(dataset)
    beton = Beton(path)
    assert (len(beton), beton.manifest) == (5, None)
    assert beton.modes.tolist() == [number] * 5
    assert beton.labels.tolist() == ([7, 6, 5, 4, 3] if labeled else [-1] * 5)
    for index, image in enumerate(images):
        assert check_record(beton, index) is None
        difference = np.abs(decode(beton, index) - image.astype(float)).mean()
        assert difference == 0 if mode == "raw" else difference < 8
