"""Betons and JPEGs forged at random, some with a manifest forged to match: refused, or harmless."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.beton import Beton, count_classes
from pipeline.beton_format import JPEG
from pipeline.columns import Columns
from pipeline.inspect import describe
from pipeline.inspect import main as inspect_main
from pipeline.manifest import columns_path, manifest_path, read_manifest
from pipeline.native import libffcv
from pipeline.native.libjpeg import decode_rectangle
from pipeline.prepare import prepare
from pipeline.storage.decode import _decode_full, check_record
from pipeline.storage.encode import Settings, Unreadable, encode
from pipeline.storage.writer import BetonWriter
from pipeline.system.errors import InputError
from tests import ROOT
from tests.hostile import Outcome, record, reliability, survived
from tests.pipeline.conftest import pack, picture, run_command, saved
from tests.pipeline.fuzz import Forger, damaged_jpeg, decode_all_ways, decode_part, fenced, use
from tests.pipeline.native.jpeg_memory import check
from tests.pipeline.native.test_libjpeg import KINDS, noisy
from tests.side_files import downgrade

KINDS = KINDS | {
    "4:1:1": {"subsampling": "4:1:1"},
    "smooth": {"quality": 5, "progressive": True},
    "thumbnail": {"exif": b"Exif\0\0" + saved(picture(9, 9))},
}


@pytest.fixture
def forger(tmp_path: Path) -> Forger:
    """A forger of a beton of JPEGs of several kinds, and raw records."""
    files = {f"a/{i}.jpg": saved(noisy(20 + 7 * i, 50 - 3 * i, i), **kind) for i, kind in enumerate(KINDS.values())}
    source = pack("folder", files, tmp_path)
    prepare(str(source), tmp_path / "x.beton", Settings(mode="proportion", jpeg_share=0.8), workers=1, quiet=True)
    return Forger(tmp_path / "x.beton")


def _forged(forger: Forger, folder: Path, count: int, first: int = 0) -> Outcome:
    def one(number: int) -> None:
        forger.write(first + number, folder / "forged.beton")
        use(folder / "forged.beton", number)

    return survived(one, count, seconds=30)


@reliability
def test_forged_betons_are_refused_or_harmless(
    forger: Forger, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outcome = _forged(forger, tmp_path, 300)
    record(record_property, outcome)
    assert outcome.bad == 0, outcome
    assert 150 < outcome.kinds["refused"] < 300
    assert outcome.mebibytes < 500


@pytest.mark.slow
@reliability
def test_ten_thousand_forged_betons_are_refused_or_harmless(
    forger: Forger, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outcome = _forged(forger, tmp_path, 10_000)
    record(record_property, outcome)
    assert outcome.bad == 0, outcome
    assert outcome.mebibytes < 1000


CHECKED = """
import sys
from pathlib import Path
import numba
from tests.pipeline.fuzz import Forger, use
from pipeline.system.errors import InputError

assert numba.config.BOUNDSCHECK == 1
forger, forged, harmless = Forger(Path(sys.argv[1])), Path(sys.argv[1] + ".forged"), 0
for number in range(int(sys.argv[2])):
    forger.write(number, forged)
    try:
        use(forged, number)
        harmless += 1
    except InputError:
        pass
print(harmless)
"""


@pytest.mark.slow
def test_compiled_code_stays_inside_its_arrays(forger: Forger, tmp_path: Path) -> None:
    """Numba checks every index and raises IndexError, which nothing catches."""
    assert forger
    environment = os.environ | {
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    call = [sys.executable, "-c", CHECKED, str(tmp_path / "x.beton"), "1000"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 100 < int(done.stdout) < 900


# ---- JPEGs ----


def _damaged(count: int) -> Outcome:
    files = [saved(noisy(97, 61), **kind) for kind in KINDS.values()]
    files += [saved(noisy(97, 61).convert(mode), quality=60) for mode in ("L", "CMYK")]

    def one(number: int) -> None:
        draw = random.Random(number)
        decode_all_ways(damaged_jpeg(draw, draw.choice(files)), draw)

    return survived(one, count, seconds=30)


@reliability
@pytest.mark.parametrize(("count", "most"), [(300, 300), pytest.param(10_000, 1000, marks=pytest.mark.slow)])
def test_damaged_jpegs_do_no_harm(count: int, most: int, record_property: Callable[[str, object], None]) -> None:
    outcome = _damaged(count)
    record(record_property, f"JPEGs: {outcome}")
    assert outcome.bad == 0, outcome
    assert outcome.mebibytes < most


@pytest.mark.slow
@reliability
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_damaged_jpegs_are_decoded_within_their_buffers(record_property: Callable[[str, object], None]) -> None:
    done = check(0, 2000)
    record(record_property, f"under valgrind: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr


def _many_scans(count: int) -> bytes:
    """Return a valid gray progressive JPEG of 2048 by 2048 pixels and `count` scans, up to 883.

    One scan for the blocks' means, of a bit each; for each other coefficient one for the highest bit and for each lower
    bit, of four runs of 16384 blocks without any.
    """
    scans = [(k, 0, 13) for k in range(1, 64)] + [(k, low + 1, low) for low in range(12, -1, -1) for k in range(1, 64)]
    tables = bytes([0xFF, 0xDB, 0, 67, 0]) + b"\1" * 64 + b"\xff\xc2\0\x0b\x08" + struct.pack(">HH", 2048, 2048)
    tables += b"\1\1\x11\0"
    for kind, symbol in ((0, 0), (0x10, 0xE0)):  # a code of one bit
        tables += bytes([0xFF, 0xC4, 0, 20, kind, 1, *[0] * 15, symbol])
    data = b"\xff\xd8" + tables + bytes([0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 0, 0]) + bytes(65536 // 8)
    for k, high, low in scans[: count - 1]:
        data += bytes([0xFF, 0xDA, 0, 8, 1, 1, 0, k, k, high << 4 | low]) + bytes(7) + b"\x0f"
    return data + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan goes over all pixels and takes 18 bytes: 8 MB of scans would take hours."""
    monkeypatch.setattr("pipeline.storage.decode.decode_jpeg", libffcv.decode_jpeg)
    sides, box = (2048, 2048), (0, 0, 2048, 2048)
    for count, scanned in ((1, True), (100, True), (101, False), (883, False)):
        data = _many_scans(count)
        assert len(data) < 30_000
        source = fenced(len(data), data)
        assert decode_part(source, sides, box) == (0 if scanned or decode_rectangle is None else 1), count
        assert _decode_full(source, *sides, None, np.zeros(3 << 22, np.uint8)) == scanned, count
        if scanned:
            encode(data, 0, Settings())
        else:
            with pytest.raises(Unreadable, match=f"a JPEG of {count} scans"):
                encode(data, 0, Settings())


def test_the_scans_of_an_ordinary_progressive_jpeg_are_decoded() -> None:
    data = saved(noisy(300, 200), progressive=True)
    assert data.count(b"\xff\xda") > 5
    assert decode_part(fenced(len(data), data), (200, 300), (0, 0, 200, 300)) == 0
    assert encode(data, 0, Settings()).data == data


def test_a_huge_image_is_refused(tmp_path: Path) -> None:
    """134 million pixels are the limit: 8 MB of JPEG could contain four billion."""
    writer = BetonWriter(tmp_path / "x.beton", 1)
    row = encode(saved(picture()), 0, Settings())
    large = io.BytesIO(row.data + bytes(9_000_000))
    writer.append(type(row)(large.getvalue(), JPEG, 65500, 65500, 0), 0)
    writer.close()
    with pytest.raises(InputError, match="sample 0 has an image of more than 134217728 pixels"):
        Beton(tmp_path / "x.beton")


# ---- manifests ----


def _say(beton: Path, **changes: object) -> None:
    path = manifest_path(beton)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"a": {"b": 1}}}, "settings and versions must be objects of plain values"),
        ({"settings": {"a": [1]}}, "settings and versions must be objects of plain values"),
        ({"settings": {"a": float("nan")}}, "NaN is not a number"),
        ({"versions": {"a": float("inf")}}, "Infinity is not a number"),
        ({"skipped": [["name", 3]]}, "skipped must list pairs"),
        ({"skipped": [[["deep"], "x"]]}, "skipped must list pairs"),
        ({"count": 10**400}, "its manifest .* says 1000"),
        ({"count": True}, "must be integers"),
        ({"classes": ["a"]}, "has label 1, and small.beton.json 1 classes"),
        ({"columns": {"size": 10**400, "name_ends": 0, "crc32": 0, "names": 0}}, "bytes, its manifest says 1000"),
        ({"columns": {"size": True, "name_ends": 0, "crc32": 0, "names": 0}}, "columns must give integers"),
        ({"columns": {"size": {}, "name_ends": 0, "crc32": 0, "names": 0}}, "columns must give integers"),
    ],
)
def test_a_hostile_manifest_is_refused(changes: dict[str, object], message: str, small: Path) -> None:
    _say(small, **changes)
    with pytest.raises(InputError, match=message):
        Beton(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 10**400}, "must list"),
        ({"crc32": [True] * 8}, "crc32 must list 8 values of type int"),
        ({"crc32": [10**400] * 8}, "outside 32 bits"),
    ],
)
def test_a_hostile_manifest_of_the_former_format_is_refused(
    changes: dict[str, object], message: str, small: Path
) -> None:
    downgrade(small)
    _say(small, **changes)
    with pytest.raises(InputError, match=message):
        Beton(small)


@reliability
def test_forged_columns_are_refused_or_harmless(small: Path, record_property: Callable[[str, object], None]) -> None:
    """Forged with a manifest that matches: random bytes, ends and headers."""
    path, manifest = columns_path(manifest_path(small)), manifest_path(small)
    original, fields = path.read_bytes(), json.loads(manifest.read_text())
    start = 8 + int.from_bytes(original[:8], "little") + 64  # of the CRC32s

    def one(number: int) -> None:
        draw, data = random.Random(number), bytearray(original)
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(len(data)) // 8 * 8
            word = draw.choice([0, 1, 8, 2**31, 2**63, 2**64 - 1, len(data), draw.getrandbits(64)])
            data[at : at + 8] = struct.pack("<Q", word)
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        path.write_bytes(data)
        crcs = {"size": len(data), "crc32": zlib.crc32(data[start : start + 32])}
        manifest.write_text(json.dumps(fields | {"columns": fields["columns"] | crcs}))
        beton = Beton(small)
        assert all(len(beton.name(index)) <= 4 * len(data) for index in range(8))
        assert describe(beton)

    outcome = survived(one, 300)
    record(record_property, f"columns: {outcome}")
    assert outcome.bad == 0, outcome
    assert 50 < outcome.kinds["refused"] < 250
    assert outcome.mebibytes < 100


def test_a_pipe_or_folder_is_no_file_of_columns(small: Path) -> None:
    path = columns_path(manifest_path(small))
    path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path)
        outcome = survived(lambda _: Beton(small), seconds=10)
        assert outcome.kinds == {"refused": 1}
        assert "small.beton.columns: cannot be read" in outcome.messages[0]
        path.unlink() if path.is_fifo() else path.rmdir()


def test_columns_of_terabytes_take_no_memory(small: Path) -> None:
    path = columns_path(manifest_path(small))
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    _say(small, columns=json.loads(manifest_path(small).read_text())["columns"] | {"size": 1 << 40})
    outcome = survived(lambda _: Beton(small))
    assert outcome.kinds == {"refused": 1}
    assert outcome.mebibytes < 10


def test_a_manifest_is_bounded_by_its_beton(small: Path) -> None:
    with open(manifest_path(small), "r+b") as file:
        file.truncate(1 << 40)
    outcome = survived(lambda _: Beton(small))
    assert outcome.kinds == {"refused": 1}
    assert "at most 16793600 are read" in outcome.messages[0]
    assert outcome.mebibytes < 10


def test_a_pipe_is_no_manifest(small: Path) -> None:
    manifest_path(small).unlink()
    os.mkfifo(manifest_path(small))
    outcome = survived(lambda _: Beton(small), seconds=10)
    assert outcome.kinds == {"refused": 1}


def test_nested_lists_in_a_manifest_take_memory_in_proportion(small: Path) -> None:
    downgrade(small)
    manifest = json.loads(manifest_path(small).read_text()) | {"crc32": [[]] * 500_000}
    manifest_path(small).write_text(json.dumps(manifest, separators=(",", ":")))
    tracemalloc.start()
    with pytest.raises(InputError, match="crc32 must list"):
        read_manifest(manifest_path(small), 8, small.stat().st_size)
    assert tracemalloc.get_traced_memory()[1] < 60 * manifest_path(small).stat().st_size
    tracemalloc.stop()


def test_names_from_outside_are_printed_harmlessly(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m"
    classes = [f"{evil}a", f"{evil}b"]
    columns = Beton(small).columns
    assert columns is not None
    path = columns_path(manifest_path(small))
    path.unlink()
    forged = Columns.from_lists([evil] * 8, columns.crc32.tolist()).write(path)
    settings = {"settings": {evil: evil}, "versions": {evil: evil}, "skipped": [[evil, evil]]}
    _say(small, columns=forged, classes=classes, **settings)
    beton = Beton(small)
    shown = describe(beton) + beton.name(0)
    with open(small, "r+b") as file:
        file.seek(int(beton.pointers[0]) + 5)
        file.write(b"damage")
    assert run_command(inspect_main, monkeypatch, small, "--verify") == 1
    shown += capsys.readouterr().out
    assert "\\x1b]0;owned" in shown
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_count_classes_refuses_a_huge_label(bare: Path) -> None:
    beton = Beton(bare)
    beton.labels[3] = 10**6
    with pytest.raises(InputError, match=r"has label 1000000: give less than 1000000"):
        count_classes(beton)
    beton.labels[3] = np.int64(7)
    assert count_classes(beton) == 8
    assert check_record(beton, 3) is None
