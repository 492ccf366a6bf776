"""Tests of hostile tars, zips, folders, images and caches: bounded in memory, time and reach, refused by name."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import stage as stage_module
from pipeline.prepare import prepare
from pipeline.sources import archives
from pipeline.sources.archives import open_source
from pipeline.stage import stage
from pipeline.storage.encode import Record, Settings, Unreadable, encode
from pipeline.storage.in_place import Direct, open_data
from pipeline.system.errors import InputError
from pipeline.system.limits import MAX_FILE_BYTES
from tests.hostile import record, reliability, survived
from tests.pipeline.conftest import pack, picture, saved, tar_bytes
from tests.pipeline.fuzz import damaged_jpeg

JPEG = saved(picture())


@pytest.fixture(scope="module", autouse=True)
def compiled_scan(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The scan of tars, compiled before the processes whose memory is measured are forked."""
    open_source(str(pack("tar", {"a/1.jpg": JPEG}, tmp_path_factory.mktemp("scan"))))


def _read_all(source: Path | str) -> None:
    """List the images and read each. Raises InputError, also for an unreadable image."""
    for item in open_source(str(source)).items:
        try:
            item.read()
        except OSError as error:
            raise InputError(str(error)) from None


def _refusal(source: Path | str, *, mebibytes: int = 50, seconds: int = 20) -> str:
    """Return the message that refuses a source, within bounds of memory and time."""
    outcome = survived(lambda _: _read_all(source), seconds=seconds)
    assert outcome.kinds == {"refused": 1}, outcome
    assert outcome.mebibytes < mebibytes
    return outcome.messages[0]


# ---- zips ----


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _entry(path: Path, at: int, kind: str, *values: int) -> None:
    """Change fields of the last member's entry in the directory, `at` bytes into it."""
    data = bytearray(path.read_bytes())
    struct.pack_into(kind, data, data.rindex(b"PK\x01\x02") + at, *values)
    path.write_bytes(data)


def test_a_zip_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/1.bmp", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 400_000
    assert "314572800 bytes" in _refusal(path)
    _entry(path, 24, "<I", 1000)  # the stated size
    for crc32 in (0, zlib.crc32(bytes(1000)), zlib.crc32(bytes(1001))):
        _entry(path, 16, "<I", crc32)
        assert "damaged in the zip" in _refusal(path)


def test_a_zip_of_many_small_bombs_is_refused_by_their_total(tmp_path: Path) -> None:
    path = _zip(tmp_path / "x.zip", {f"a/{i}.bmp": bytes(20 << 20) for i in range(20)})
    assert "more than 200 times as many: a bomb" in _refusal(path)


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path / "x.zip", {"a/1.bmp": bytes(1 << 20), "a/2.bmp": bytes(1 << 20)})
    _entry(path, 42, "<I", 0)  # offset of the second member
    assert "overlaps the next member" in _refusal(path)


@pytest.mark.parametrize(
    ("at", "kind", "value"),
    [(20, "<I", 2**32 - 2), (20, "<I", 5000), (24, "<I", 2**32 - 2), (24, "<I", 0), (42, "<I", 2**31), (16, "<I", 1)],
)
def test_a_zip_with_false_sizes_is_refused(at: int, kind: str, value: int, tmp_path: Path) -> None:
    path = _zip(tmp_path / "x.zip", {"a/1.jpg": JPEG, "a/2.jpg": JPEG})
    _entry(path, at, kind, value)
    assert _refusal(path)


def test_a_huge_zip_directory_is_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path / "x.zip", {"a/1.jpg": JPEG})
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"PK\x05\x06") + 12, 2**32 - 2)
    path.write_bytes(data)
    assert "not an intact zip file" in _refusal(path)


NAMES = ["../a.jpg", "a/../../b.jpg", "/etc/a.jpg", "a\\b.jpg", "./../a.jpg", ".."]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_out_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = pack(kind, {"a/1.jpg": JPEG, name: JPEG}, tmp_path / "inside")
    assert "pack it again, with names inside one folder" in _refusal(path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_name_too_long_for_a_manifest_is_refused(kind: str, tmp_path: Path) -> None:
    path = pack(kind, {"/".join(["a" * 200] * 3) + ".jpg": JPEG}, tmp_path)
    assert "has more than 512 bytes: shorten it" in _refusal(path)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_files_are_counted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(kind, {f"{i}.txt": b"" for i in range(6)} | {"1.jpg": JPEG}, tmp_path)
    monkeypatch.setattr(archives, "MAX_FILES", 7)
    _read_all(path)
    monkeypatch.setattr(archives, "MAX_FILES", 6)
    assert "more than 6 files: split it" in _refusal(path)


# ---- tars ----


def _header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """Return a member's header with any size field."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _binary(size: int) -> bytes:
    """Return a size in 12 bytes of base 256."""
    return bytes([0xFF if size < 0 else 0x80]) + (size % 256**11).to_bytes(11, "big")


def _pax(**records: str) -> bytes:
    """Return an extended header with attributes of the next member."""
    lines = b""
    for key, value in records.items():
        line = f" {key.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 12) if n == len(line) + len(str(n)))
        lines += b"%d" % length + line
    return _header("pax", b"%011o" % len(lines), b"x") + lines.ljust(-(-len(lines) // 512) * 512, b"\0")


END = bytes(1024)
TARS: dict[str, bytes] = {
    "negative": _header("1.jpg", _binary(-512)) + END,
    "negative, back to itself": tar_bytes({"0.jpg": b"x"})[:1024] + _header("1.jpg", _binary(-1024)) + END,
    "negative by one": _header("1.jpg", _binary(-1)) + END,
    "negative, of a kind that is none": tar_bytes({"0.jpg": b"x"})[:1024] + _header("1.jpg", _binary(-512), b"Z") + END,
    "huge": _header("1.jpg", _binary(2**80)) + END,
    "beyond the end": _header("1.jpg", b"77777777777") + END,
    "cut off": tar_bytes({"1.jpg": bytes(5000)})[:2000],
    "a long name of terabytes": _header("././@LongLink", _binary(2**43), b"L") + END,
    "a negative long name": _header("././@LongLink", _binary(-512), b"L") + bytes(1 << 20) + END,
    "a pax header of terabytes": _header("pax", _binary(2**43), b"x") + END,
    "a pax header of 2 MiB": _header("pax", _binary(1 << 21), b"x") + bytes(1 << 21) + END,
    "a negative pax header": _header("pax", _binary(-512), b"x") + bytes(1 << 20) + END,
    "pax headers without end": _pax(comment="x") * 5000 + END,
    "pax size": _pax(size="9" * 400) + _header("1.jpg", b"1") + bytes(512) + END,
    "negative pax size": _pax(size="-1024") + _header("1.jpg", b"1") + bytes(512) + END,
    "pax path": _pax(path="../" * 100 + "x.jpg") + _header("1.jpg", b"1") + bytes(512) + END,
    "sparse": _pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=str(2**60))
    + _header("1.jpg", b"1000")
    + b"1\n0\n512\n".ljust(512, b"\0")
    + bytes(512)
    + END,
    "old sparse": _header("1.jpg", b"1", b"S") + bytes(512) + END,
    "hard link": _header("1.jpg", b"0", b"1") + END,
    "symbolic link": _header("1.jpg", b"0", b"2") + END,
    "no end": _header("1.jpg", b"0") + b"x" * 512,
}


@pytest.mark.parametrize("data", TARS.values(), ids=TARS)
@pytest.mark.parametrize("within", [False, True], ids=["tar", "tar in a tar"])
def test_a_hostile_tar_is_refused(data: bytes, within: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes({"a.tar": data}) if within else data)
    assert "x.tar: " in _refusal(path)
    assert list(tmp_path.iterdir()) == [path]
    if not within:
        outcome = survived(lambda _: Direct(path), seconds=20)
        assert outcome.kinds == {"refused": 1}, outcome


def test_devices_and_pipes_in_a_tar_are_skipped(tmp_path: Path) -> None:
    odd = b"".join(_header(f"{kind.decode()}.jpg", b"0", kind) for kind in (b"3", b"4", b"6", b"5"))
    (tmp_path / "x.tar").write_bytes(odd + tar_bytes({"1.jpg": JPEG}))
    assert [item.name for item in open_source(str(tmp_path / "x.tar")).items] == ["1.jpg"]


def test_tars_are_opened_to_the_second_level_only(tmp_path: Path) -> None:
    inner = {f"{i}.jpg": JPEG for i in range(2)}
    data = tar_bytes({"c.tar": tar_bytes({"b.tar": tar_bytes({"a.tar": tar_bytes(inner)}), "x.jpg": JPEG})})
    (tmp_path / "x.tar").write_bytes(data)
    assert [item.name for item in open_source(str(tmp_path / "x.tar")).items] == ["c/x.jpg"]


def test_empty_members_take_no_memory(tmp_path: Path) -> None:
    """There may be millions; tarfile alone would store a kilobyte of each."""
    with open(tmp_path / "x.tar", "wb") as file:
        for number in range(5000):
            file.write(_header(f"{number}.txt", b"0"))
        file.write(tar_bytes({"1.jpg": JPEG}))
    tracemalloc.start()
    _read_all(tmp_path / "x.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


@pytest.mark.parametrize("kind", [b"L", b"x", b"g"])
def test_a_header_of_a_terabyte_is_not_read(kind: bytes, tmp_path: Path) -> None:
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(_header("x", _binary(1 << 40), kind))
        file.truncate(1 << 41)
    assert "a header of" in _refusal(tmp_path / "x.tar")


def _mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(changed))
        if draw.random() < 0.5:
            changed[at] ^= 1 << draw.randrange(8)
        else:
            changed[at : at + 4] = draw.choice([b"\xff" * 4, bytes(4), draw.randbytes(4), b"7777", b"\x80\0\0\0"])
    return bytes(changed[: draw.randrange(len(changed)) if draw.random() < 0.1 else None])


@reliability
@pytest.mark.parametrize("kind", ["tar", "tar of tars", "zip"])
def test_random_changes_to_archives_do_no_harm(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    files = {f"{'ab'[i % 2]}/{i}.jpg": JPEG[: 50 + i] for i in range(6)}
    path = tmp_path / ("x.zip" if kind == "zip" else "x.tar")
    data = _zip(path, files).read_bytes() if kind == "zip" else tar_bytes(files)
    data = tar_bytes({"a.tar": data, "b.tar": data}) if kind == "tar of tars" else data

    def one(number: int) -> None:
        path.write_bytes(_mutated(data, random.Random(number)))
        _read_all(path)

    outcome = survived(one, 500, seconds=20)
    record(record_property, f"{kind}: {outcome}")
    assert outcome.bad == 0, outcome
    assert outcome.mebibytes < 50


@reliability
def test_nothing_is_written_but_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """No archive is unpacked: no member is written anywhere."""
    work, out = tmp_path / "work", tmp_path / "out"
    for folder in (work, out):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TMPDIR", str(work))
    monkeypatch.setenv("XDG_CACHE_HOME", str(out))
    before, tried = set(), 0
    for number, data in enumerate([*TARS.values(), tar_bytes({"a/1.jpg": JPEG})]):
        for name in ("../" * number + "x.tar", f"{number}.tar"):
            path = tmp_path / "before" / Path(name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            before.add(path)
            for act in (lambda: prepare(str(path), out / "x.beton", workers=1, quiet=True), lambda: Direct(path)):  # noqa: B023
                tried += 1
                try:
                    act()
                except InputError:
                    continue
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parts[len(tmp_path.parts)] for path in written} == {"out"}
    record(record_property, f"{tried} readings of hostile tars: 0 files outside the output")


# ---- images ----


def _png(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(), "png"))
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def _gif(width: int, height: int) -> bytes:
    data = bytearray(saved(picture().convert("P"), "gif"))
    at = data.index(b",\0\0\0\0")
    struct.pack_into("<HH", data, at + 5, width, height)  # of the frame: the screen is small
    return bytes(data)


def _bmp(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(), "bmp"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


def _tiff(width: int, height: int, tile: tuple[int, int] | None = None) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    packed = zlib.compress(bytes(1 << 20))
    tags += [(322, tile[0]), (323, tile[1]), (324, 8), (325, len(packed))] if tile else [(273, 8), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def _webp(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGBA", (40, 24)), "webp", lossless=True, exact=True))
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes([0x10, 0, 0, 0])
    chunk += struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + chunk + bytes(data[12:])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(JPEG)
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


BOMBS = {
    "png": _png(60_000, 60_000),
    "png, a line": _png(2_000_000_000, 1),
    "gif": _gif(60_000, 60_000),
    "bmp": _bmp(60_000, 60_000),
    "ppm": b"P6 60000 60000 255\n" + bytes(1000),
    "pgm": b"P5 60000 60000 65535\n" + bytes(1000),
    "plain ppm": b"P3 60000 60000 255\n" + b"0 " * 1000,
    "tiff": _tiff(60_000, 60_000),
    "tiff of a huge tile": _tiff(16, 16, (30_000, 30_000)),
    "tiff of a tile without end": _tiff(16, 16, (2**31, 2**31)),
    "webp": _webp(16_000, 16_000),
    "jpeg": _jpeg(60_000, 60_000),
    "just above": _png(1 << 14, (1 << 13) + 1),
}


@reliability
def test_decompression_bombs_are_refused_before_memory_is_taken(record_property: Callable[[str, object], None]) -> None:
    def one(number: int) -> None:
        try:
            encode(list(BOMBS.values())[number], 0, Settings())
        except Unreadable as reason:
            raise InputError(str(reason)) from None

    outcome = survived(one, len(BOMBS), seconds=20)
    record(record_property, f"{len(BOMBS)} decompression bombs: {outcome.kinds['refused']} refused")
    assert outcome.kinds == {"refused": len(BOMBS)}, outcome
    assert all("pixels" in message or "not an image" in message for message in outcome.messages), outcome.messages
    assert outcome.mebibytes < 60


@reliability
def test_damaged_images_of_all_formats_do_no_harm(record_property: Callable[[str, object], None]) -> None:
    small = picture(64, 48)
    files = [saved(small, kind) for kind in ("png", "gif", "bmp", "ppm", "webp", "tiff")]
    files += [saved(small, "tiff", compression=method) for method in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    files += [
        saved(small, "png", optimize=True),
        saved(small.convert("P"), "gif", save_all=True, append_images=[small]),
    ]
    files += [saved(Image.fromarray(np.arange(3072, dtype="u2").reshape(48, 64)), "png"), _tiff(64, 48, (32, 32))]

    def one(number: int) -> None:
        draw = random.Random(number)
        try:
            encode(damaged_jpeg(draw, draw.choice(files)), 0, Settings(max_side=32))
        except Unreadable as reason:
            raise InputError(str(reason)) from None

    outcome = survived(one, 700, seconds=20)
    record(record_property, f"images of other formats: {outcome}")
    assert outcome.bad == 0, outcome
    assert outcome.mebibytes < 600


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_the_largest_size_is_read() -> None:
    data = saved(Image.new("1", (1 << 14, 1 << 13)), "png")
    assert encode(data, 0, Settings()).width == 500


@pytest.mark.parametrize(("side", "held"), [(4096, 0), (4097, 1)])
def test_a_large_image_is_decoded_alone(side: int, held: int) -> None:
    """All workers of `prepare` share a lock."""
    taken = []

    @contextlib.contextmanager
    def lock() -> Iterator[None]:
        taken.append(1)
        yield

    encode(saved(Image.new("1", (side, 4096)), "png"), 0, Settings(), lock())
    assert len(taken) == held


def test_workers_share_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are forked with the patched function."""

    def record(data: bytes, index: int, settings: Settings, lock: Any) -> Record:
        with lock, open(tmp_path / "log", "a") as file:
            file.write("in ")
            file.flush()
            time.sleep(0.02)
            file.write("out ")
        return encode(data, index, settings)

    monkeypatch.setattr("pipeline.prepare.encode", record)
    folder = pack("folder", {f"a/{i}.jpg": JPEG for i in range(20)}, tmp_path)
    prepare(str(folder), tmp_path / "x.beton", workers=2, quiet=True)
    assert (tmp_path / "log").read_text().split()[2:] == ["in", "out"] * 20  # after the parent's, which compiles


def test_other_formats_are_not_opened() -> None:
    """Pillow hands PostScript to Ghostscript."""
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n(owned) print quit\n%%EOF\n"
    for data in (page, saved(picture(), "pcx"), saved(picture(), "ico"), saved(picture(), "jpeg2000")):
        with pytest.raises(Unreadable, match="not an image"):
            encode(data, 0, Settings())


@pytest.mark.parametrize("kind", ["gif", pytest.param("tiff", marks=pytest.mark.slow)])
def test_the_first_of_many_frames_is_taken(kind: str) -> None:
    frames = [Image.new("P", (8, 8), i % 256) for i in range(3000)]
    data = saved(Image.new("P", (8, 8)), kind, save_all=True, append_images=frames)
    outcome = survived(lambda _: encode(data, 0, Settings()), seconds=5)
    assert outcome.kinds == {"harmless": 1}
    assert outcome.mebibytes < 20


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_sixteen_bit_images_take_little_memory(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (3001, 2001))
    image = Image.fromarray(values.astype("u2" if mode == "I;16" else "i4" if mode == "I" else "f4"))
    data = saved(image, "tiff")
    outcome = survived(lambda _: encode(data, 0, Settings(mode="raw", max_side=0)))
    assert outcome.mebibytes < 120  # 6 million pixels, of which the record has 18 MB, and Pillow's RGB 24
    pixels = np.frombuffer(encode(data, 0, Settings(mode="raw", max_side=0)).data, np.uint8).reshape(3001, 2001, 3)
    assert (pixels[:, :, 0] == np.rint(values / 257)).all()


def test_a_jpeg_with_junk_is_not_stored_unchanged() -> None:
    junk = b"".join(b"\xff\xfe\xff\xff" + bytes(65533) for _ in range(20))
    assert len(encode(JPEG[:2] + junk + JPEG[2:], 0, Settings()).data) < 70_000  # Pillow writes one comment
    exif = b"\xff\xfe\xff\xff" + bytes(65533)
    assert encode(JPEG[:2] + exif + JPEG[2:], 0, Settings()).data == JPEG[:2] + exif + JPEG[2:]


# ---- folders ----


def test_special_files_in_a_folder_are_named(tmp_path: Path) -> None:
    folder = pack("folder", {"a/1.jpg": JPEG, "a/2.jpg": JPEG}, tmp_path)
    os.mkfifo(folder / "a" / "3.jpg")
    (folder / "a" / "4.jpg").symlink_to("/dev/zero")
    with open(folder / "a" / "5.jpg", "wb") as file:
        file.truncate(1 << 40)

    def one(_: int) -> None:
        made = prepare(str(folder), tmp_path / "x.beton", workers=1, skip_bad=3, quiet=True)
        assert [name for name, _ in made.skipped] == ["a/3.jpg", "a/4.jpg", "a/5.jpg"]
        assert [reason for _, reason in made.skipped] == [
            "cannot be read: not a regular file",
            "cannot be read: not a regular file",
            f"cannot be read: {1 << 40} bytes, more than {MAX_FILE_BYTES}",
        ]

    outcome = survived(one, seconds=20)
    assert outcome.kinds == {"harmless": 1}, outcome
    assert outcome.mebibytes < 100


def test_links_that_lead_upwards_are_refused(tmp_path: Path) -> None:
    folder = pack("folder", {"a/1.jpg": JPEG}, tmp_path)
    for name in ("b", "c"):
        (folder / "a" / name).symlink_to(folder)
    assert "is a link to a folder that it is in" in _refusal(folder)


# ---- images read in place ----


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "millrace"


def _huge_array() -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (10**12, 2)})
    return header.getvalue()


@pytest.mark.parametrize(
    "data",
    [_huge_array(), b"", bytes(15), bytes(17), b"\x80\x04junk.", np.full(4, -(2**31), "i4").tobytes(), b"\xff" * 16],
    ids=["array", "empty", "short", "long", "pickle", "negative", "minus one"],
)
def test_a_forged_cache_does_no_harm(data: bytes, tmp_path: Path, cache: Path) -> None:
    pack("tar", {"a/1.jpg": JPEG, "a/2.jpg": JPEG}, tmp_path)
    true = Direct(tmp_path / "source.tar")
    (kept,) = cache.iterdir()
    kept.write_bytes(data)

    def one(_: int) -> None:
        assert Direct(tmp_path / "source.tar").heights.tolist() == true.heights.tolist()

    outcome = survived(one, seconds=20)
    assert outcome.bad == 0, outcome
    assert len(data) == 16 or outcome.kinds == {"harmless": 1}
    assert outcome.mebibytes < 20


def test_a_cache_that_is_a_pipe_or_device_is_not_read(tmp_path: Path, cache: Path) -> None:
    pack("tar", {"a/1.jpg": JPEG}, tmp_path)
    Direct(tmp_path / "source.tar")
    (kept,) = cache.iterdir()
    for make in (lambda: os.mkfifo(kept), lambda: kept.symlink_to("/dev/zero")):
        kept.unlink()
        make()
        outcome = survived(lambda _: Direct(tmp_path / "source.tar"), seconds=20)
        assert outcome.kinds == {"harmless": 1}, outcome


@pytest.mark.parametrize(
    "pattern",
    [
        "x-{0..999999999999}.tar",
        "x-{0..9999}{0..9999}{0..9999}.tar",
        "x-" + "{a,b}" * 30 + ".tar",
        "x-" + "{a,b}" * 5000 + ".tar",
        "x-{0.." + "9" * 50_000 + "}.tar",
        "x-{" + "," * 200_000 + "}.tar",
    ],
    ids=["wide", "deep", "many", "very many", "digits", "commas"],
)
@pytest.mark.usefixtures("cache")
def test_braces_do_not_expand_without_bound(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = survived(lambda _: open_data(pattern), seconds=20)
    assert outcome.kinds == {"refused": 1}, outcome
    assert outcome.mebibytes < 60


@pytest.mark.usefixtures("cache")
def test_undecodable_names_are_read(tmp_path: Path) -> None:
    name = b"caf\xe9\x1b.jpg".decode("utf-8", "surrogateescape")
    pack("tar", {f"a/{name}": JPEG}, tmp_path)
    assert Direct(tmp_path / "source.tar").fingerprint


def test_an_image_that_claims_too_much_is_unreadable(tmp_path: Path, cache: Path) -> None:
    pack("tar", {"a/1.jpg": JPEG, "a/2.jpg": _jpeg(60_000, 60_000) + bytes(8_000_000)}, tmp_path)
    assert Direct(tmp_path / "source.tar", tolerate=True).unreadable == {1}
    assert cache.exists()


# ---- copies ----


def test_a_copy_is_never_written_through_a_planted_link(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, disk = tmp_path / "victim", tmp_path / "disk"
    disk.mkdir()
    victim.write_text("precious")
    ends = ("", ".json", ".columns")
    for name in (f"{start}{drawn.name}{end}" for start in ("", ".writing-") for end in ends):
        (disk / name).symlink_to(victim)
    assert stage(drawn, disk).read_bytes() == drawn.read_bytes()
    assert not any(path.is_symlink() for path in disk.iterdir())
    usage = stage_module.shutil.disk_usage

    def plant(path: Path) -> object:
        (disk / f".writing-{drawn.name}").symlink_to(victim)
        return usage(path)

    (disk / drawn.name).unlink()
    monkeypatch.setattr(stage_module.shutil, "disk_usage", plant)
    with pytest.raises(InputError, match="File exists"):
        stage(drawn, disk)
    assert victim.read_text() == "precious"


def test_a_copy_stays_in_its_folder(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    link = tmp_path / "a" / "b.beton"
    link.symlink_to(drawn)
    assert stage(tmp_path / "a" / ".." / "a" / "b.beton", tmp_path / "disk") == tmp_path / "disk" / "b.beton"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["b.beton", "b.beton.columns", "b.beton.json"]
    for name in ("..", ".", "a/.."):
        with pytest.raises(InputError):
            stage(tmp_path / name, tmp_path / "disk")
