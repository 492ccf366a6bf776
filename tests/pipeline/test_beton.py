"""Tests of reading betons: truncated, forged and foreign files, and mismatched manifests."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from pipeline.backends.select_backend import decoding_rate
from pipeline.beton import Beton
from pipeline.beton_format import JPEG, RAW
from pipeline.columns import COLUMNS, Columns
from pipeline.inspect import describe
from pipeline.manifest import Manifest, columns_path, manifest_path, read_manifest
from pipeline.native import libffcv
from pipeline.prepare import prepare
from pipeline.storage.decode import check_record, decode, records_of
from pipeline.storage.encode import Settings, encode
from pipeline.storage.writer import BetonWriter
from pipeline.system.errors import InputError
from tests.pipeline.conftest import picture, saved
from tests.side_files import copy_side_files, downgrade, names_of

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
        ({"format": 3}, "manifest format 3, this version reads 1 and 2: write it again"),
        ({"format": None}, "manifest format None"),
        ({"format": True}, "manifest format True"),
        ({"count": 7}, "has 8 samples in .* its manifest .* says 7"),
        ({"count": "8"}, "must be integers"),
        ({"count": 8.0}, "must be integers"),
        ({"count": None}, "must be integers"),
        ({"file_size": 10}, "its manifest .* says 8 in 10"),
        ({"header_crc32": 1}, "header or metadata do not match its manifest"),
        ({"header_crc32": True}, "must be integers"),
        ({"crc32": [0] * 8}, "not a manifest"),
        ({"columns": {}}, "columns must give integers for size, name_ends, crc32, names"),
        ({"columns": [1, 2, 3, 4]}, "columns must give integers"),
        ({"columns": dict.fromkeys(["size", *COLUMNS], 1.0)}, "columns must give integers"),
        ({"columns": dict.fromkeys(["size", *COLUMNS, "more"], 1)}, "columns must give integers"),
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
    ("changes", "message"),
    [
        ({"count": 7}, "must list 7 values"),
        ({"count": 7, "crc32": [0] * 7, "names": ["x"] * 7}, "has 8 samples in .* its manifest .* says 7"),
        ({"crc32": [0] * 7}, "crc32 must list 8 values of type int"),
        ({"crc32": [0.5] * 8}, "crc32 must list 8 values of type int"),
        ({"crc32": [-1] * 8}, "outside 32 bits"),
        ({"crc32": [2**32] * 8}, "outside 32 bits"),
        ({"crc32": {"0": 1}}, "crc32 must list 8 values of type int"),
        ({"names": [1] * 8}, "names must list 8 values of type str"),
        ({"names": "12345678"}, "names must list 8 values of type str"),
        ({"extra": 1}, "not a manifest"),
    ],
)
def test_a_mismatched_manifest_of_the_former_format_is_refused(
    changes: dict[str, object], message: str, small: Path
) -> None:
    downgrade(small)
    _change_manifest(small, **changes)
    with pytest.raises(InputError, match=message):
        Beton(small)


def test_a_manifest_of_the_former_format_is_read_the_same(small: Path) -> None:
    """Names that no UTF-8 has, too; the fingerprint, which checkpoints contain, stays."""
    now, names = Beton(small), names_of(small)
    assert now.crc32 is not None
    downgrade(small)
    former = Beton(small)
    assert (former.fingerprint, former.classes, names_of(small)) == (now.fingerprint, now.classes, names)
    assert former.crc32 is not None
    assert former.crc32.tolist() == now.crc32.tolist()
    _change_manifest(small, names=[*names[:6], "\udce9", "\ud800"])
    assert [Beton(small).name(index) for index in (0, 6, 7)] == [names[0], "\\udce9", "?"]


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
    copy_side_files(tmp_path / "other.beton", small)
    with pytest.raises(InputError, match=r"its manifest small\.beton\.json says 8 in"):
        Beton(small)


@pytest.mark.parametrize("change", [lambda path: _row(path, 2, label=1), lambda path: _entry(path, 2, sample=5)])
def test_changed_metadata_is_found_by_the_manifest(change: Callable[[Path], None], small: Path) -> None:
    change(small)
    with pytest.raises(InputError, match="header or metadata do not match"):
        Beton(small)


def test_a_manifest_and_its_columns_round_trip(small: Path, tmp_path: Path) -> None:
    manifest, columns = _manifest(small)
    names = [b"caf\xe9".decode("utf-8", "surrogateescape"), "", "größe.jpg", *"abcde"]
    manifest.skipped = [["größe.jpg", "the file is empty"]]
    changed = Columns.from_lists(names, columns.crc32.tolist())
    manifest.columns = changed.write(tmp_path / "copy.beton.columns")
    manifest.write(tmp_path / "copy.beton.json")
    again, read = read_manifest(tmp_path / "copy.beton.json", 8, small.stat().st_size)
    assert again == manifest
    assert [read.name(index) for index in range(8)] == names
    assert read.crc32.tolist() == columns.crc32.tolist()


# ---- columns ----


def _manifest(beton: Path) -> tuple[Manifest, Columns]:
    return read_manifest(manifest_path(beton), 8, beton.stat().st_size)


def test_columns_are_a_safetensors_file(small: Path) -> None:
    """The package reads the same, and the manifest has their CRC32s."""
    path, beton = columns_path(manifest_path(small)), Beton(small)
    tensors = load_file(path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "name_ends": np.int64,
        "crc32": np.uint32,
        "names": np.uint8,
    }
    assert tensors["crc32"].tolist() == [zlib.crc32(beton.record(index)) for index in range(8)]
    names = tensors["names"].tobytes().decode()
    assert np.split(list(names), tensors["name_ends"][:-1])[5].tolist() == list(beton.name(5))
    manifest, _ = _manifest(small)
    assert manifest.columns == {"size": path.stat().st_size} | {
        name: zlib.crc32(tensor.tobytes()) for name, tensor in tensors.items()
    }


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no such file, which belongs to the manifest: copy it too, or write it again"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, its manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, its manifest says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, its manifest says"),
        (lambda path: _flip(path, 0), "its header is not that of the columns of 8 records"),
        (lambda path: _flip(path, 7), "its header is not that of the columns of 8 records"),
        (lambda path: _flip(path, 30), "its header is not that of the columns of 8 records"),
        (lambda path: _set(path, 0, b"\xff" * 8), "its header is not that of the columns of 8 records"),
        (lambda path: _flip(path, _crc_start(path)), "is not of its manifest"),
    ],
)
@pytest.mark.usefixtures("_memory")
def test_other_columns_are_refused(change: Callable[[Path], None], message: str, small: Path) -> None:
    change(columns_path(manifest_path(small)))
    with pytest.raises(InputError, match=message) as error:
        Beton(small)
    assert "small.beton.columns: " in str(error.value)
    assert "python -m pipeline.prepare" in str(error.value)


def _crc_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little") + 8 * 8


def test_columns_of_another_beton_are_refused(small: Path, tmp_path: Path) -> None:
    """Of the same number of records and bytes."""
    columns = Columns.from_lists(names_of(small), [7] * 8)
    columns_path(manifest_path(small)).unlink()
    columns.write(columns_path(manifest_path(small)))
    with pytest.raises(InputError, match=r"small\.beton\.columns: is not of its manifest \(CRC32\): copy both again"):
        Beton(small)


@pytest.mark.parametrize("ends", [[-1] * 8, [2**63 - 1] * 8, [0] * 7 + [2**40], list(range(8, 0, -1))])
def test_forged_places_of_names_give_numbers_for_names(ends: list[int], small: Path) -> None:
    """A name is only for messages, which it must not hide."""
    path = columns_path(manifest_path(small))
    _set(path, _crc_start(path) - 64, np.array(ends, "<i8").tobytes())
    beton = Beton(small)
    assert beton.name(7) == "number 7"
    assert [len(beton.name(index)) < 20 for index in range(8)] == [True] * 8
    assert check_record(beton, 7) is None


def test_tables_and_columns_are_mapped_not_copied(small: Path) -> None:
    beton = Beton(small)
    for column in (beton.heights, beton.widths, beton.modes, beton.pointers, beton.labels, beton.sizes, beton.crc32):
        assert column is not None
        while not isinstance(column, np.memmap):
            assert not column.flags.owndata
            column = column.base
        assert Path(column.filename).name in ("small.beton", "small.beton.columns")


def _repeated(path: Path, count: int) -> None:
    """Write a beton whose samples share one record."""
    writer = BetonWriter(path, 1)
    writer.append(encode(saved(picture()), 0, Settings()), 0)
    writer.close()
    data = path.read_bytes()
    version, fields, page, _, table = HEADER.unpack_from(data)
    mode, width, height, pointer, label = ROW.unpack_from(data, ROWS)
    record, start = data[pointer:table], ROWS + count * ROW.size
    front = HEADER.pack(version, fields, page, count, start + len(record)) + data[HEADER.size : ROWS]
    row = ROW.pack(mode, width, height, start, label)
    path.write_bytes(front + row * count + record + ENTRY.pack(0, start, len(record)) * count)


def test_memory_does_not_grow_with_the_number_of_records(tmp_path: Path) -> None:
    """Of opening, fingerprint and description; tables and columns are mapped."""
    peaks = []
    for count in (100_000, 400_000):
        path = tmp_path / f"{count}.beton"
        _repeated(path, count)
        columns = Columns(np.arange(1, count + 1), np.zeros(count, np.uint32), np.full(count, ord("x"), np.uint8))
        crcs = columns.write(columns_path(manifest_path(path)))
        Manifest(count, [], Beton(path).header_crc32, path.stat().st_size, {}, {}, crcs).write(manifest_path(path))
        tracemalloc.start()
        beton = Beton(path)
        assert beton.fingerprint.endswith(f"-{count}-{zlib.crc32(bytes(4 * count)):08x}")
        assert f"{count} images" in describe(beton)
        assert (beton.name(count - 1), decoding_rate(beton, 1) > 0) == ("x", True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0] + 100_000
    assert peaks[1] < 16 << 20


def test_a_changed_label_stays_in_memory(small: Path) -> None:
    before, beton = small.read_bytes(), Beton(small)
    beton.labels[3] = 7
    assert beton.labels.tolist() == [0, 0, 0, 7, 1, 1, 1, 1]
    assert small.read_bytes() == before
    assert Beton(small).fingerprint == beton.fingerprint


def test_sizes_of_a_table_in_another_order_are_found(bare: Path) -> None:
    """FFCV's writer appends to it from several workers."""
    expected, table, data = Beton(bare).sizes.tolist(), _table(bare), bare.read_bytes()
    entries = [data[at : at + ENTRY.size] for at in range(table, len(data), ENTRY.size)]
    bare.write_bytes(data[:table] + b"".join(entries[i] for i in (3, 1, 0, 2, 7, 6, 5, 4)))
    assert Beton(bare).sizes.tolist() == expected
    bare.write_bytes(bare.read_bytes() + ENTRY.pack(8, 5000, 7))  # of another field
    assert Beton(bare).sizes.tolist() == expected


@pytest.mark.parametrize("change", ["height", "width", "pointer", "size"])
def test_a_file_that_is_overwritten_while_it_is_read_is_an_error(change: str, bare: Path) -> None:
    """Its tables are mapped: compiled code reads places that were not checked at the start."""
    beton, index = Beton(bare), _first(bare, RAW)
    assert len(records_of(beton, np.arange(8)).sizes) == 8
    if change == "height":
        _row(bare, index, height=65535)
    elif change == "width":  # of no more pixels than another image
        _row(bare, _first(bare, JPEG), height=1, width=600)
    elif change == "pointer":
        _pointer(bare, index, BIG)
    else:
        _entry(bare, index, size=2**60)
    with pytest.raises(InputError, match="was overwritten while it was read"):
        records_of(beton, np.arange(8))


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
