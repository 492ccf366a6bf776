"""Tests of our reading of tar headers against Python's tarfile, which reads the same archives alone."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from pipeline.sources import tar_headers
from pipeline.sources.archives import tar_files
from pipeline.sources.tar_headers import TarPart
from pipeline.system.errors import InputError

Listed = list[tuple[str, int, int]]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = ["a.jpg", "x" * 99, "x" * 100, "x" * 101, "d" * 60 + "/" + "e" * 60, "p/" * 120 + "q.jpg", "Île/größe 1.jpg"]
NAMES += ["猫 と/ねこ 'two'.jpg", "猫" * 60, "a=b\tc", "new\nline", "./dot", "slash/", "\udcff\udcfe.jpg", " spaces  "]
END = bytes(1024)


def _reference(path: Path) -> Listed | str:
    """Return name, first byte and size of the files that tarfile lists, or "refused"."""
    listed: Listed = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as archive:
            for member in archive:
                if member.islnk() or member.issym() or member.issparse():
                    return "refused"
                if member.isfile():
                    if not 0 <= member.size <= size - member.offset_data:
                        return "refused"
                    listed.append((member.name, member.offset_data, member.size))
            with path.open("rb") as file:
                file.seek(archive.offset)
                return listed if file.read(512) == bytes(512) else "refused"
    except (tarfile.TarError, OSError, ValueError, OverflowError):
        return "refused"


def _listed(path: Path) -> Listed | str:
    """Return the same by our reading."""
    with path.open("rb") as file:
        try:
            return list(tar_headers.files(TarPart(file.fileno(), 0, path.stat().st_size)))
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError):
            return "refused"


def _member(name: str, size: int, kind: int, draw: random.Random, **pax: str) -> bytes:
    """Return a member's headers, in a format that can name it, and its content."""
    member = tarfile.TarInfo(name)
    member.size, member.pax_headers = size, pax
    member.mtime = draw.choice([0, 1_700_000_000, 1_700_000_000.25])
    member.uname, member.uid = draw.choice(["", "größe"]), draw.choice([0, 1000, 5_000_000])
    try:
        head = member.tobuf(kind, "utf-8", "surrogateescape")
    except ValueError:  # ustar has no room
        head = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return head + draw.randbytes(size).ljust(-(-size // 512) * 512, b"\0")


def _archive(number: int) -> bytes:
    """Return a tar of random members of all kinds."""
    draw = random.Random(number)
    parts = []
    for _ in range(draw.choice([1, 3, 20, 150])):
        name, kind = draw.choice(NAMES), draw.choice(list(FORMATS.values()))
        odd = draw.random()
        if odd < 0.05:
            folder = tarfile.TarInfo(draw.choice(NAMES))
            folder.type = draw.choice([tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"7", b"Z"])
            parts.append(folder.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        elif odd < 0.08:
            parts.append(tarfile.TarInfo.create_pax_global_header({"comment": "x"}))
        else:
            pax = {"comment": "größe", "SCHILY.xattr.user.x": "=\n="} if odd < 0.15 else {}
            parts.append(_member(name, draw.choice([0, 1, 511, 512, 513, 700, 5000, 90_000]), kind, draw, **pax))
    return b"".join(parts) + _member("last.jpg", 3, tarfile.PAX_FORMAT, draw) + END * draw.choice([1, 5])


@pytest.mark.parametrize("number", range(40))
def test_files_are_those_that_tarfile_lists(number: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(_archive(number))
    listed = _listed(path)
    assert listed == _reference(path)
    assert listed != "refused"


def test_damaged_tars_are_refused_as_by_tarfile(tmp_path: Path) -> None:
    path, refused = tmp_path / "x.tar", 0
    for number in range(150):
        draw = random.Random(number)
        data = bytearray(_archive(number % 10)[:20_000])
        for _ in range(draw.choice([1, 2])):
            at = draw.randrange(len(data) // 512) * 512 + draw.randrange(512)
            data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data[: draw.choice([None, None, draw.randrange(len(data))])])
        expected = _reference(path)
        assert _listed(path) == expected, number
        refused += expected == "refused"
    assert 30 < refused < 150


def _patched(block: bytes, at: int, field: bytes, *, signed: bool = False) -> bytes:
    """Return a header with a changed field and the checksum of its bytes."""
    changed = bytearray(block)
    changed[at : at + len(field)] = field
    changed[148:156] = b" " * 8
    negative = sum(byte > 127 for byte in changed) if signed else 0  # as some tars took bytes for signed
    changed[148:156] = b"%06o\0 " % (sum(changed) - 256 * negative)
    return bytes(changed)


PLAIN = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
ODD = {
    "size in spaces": _patched(PLAIN, 124, b"        17 \0"),
    "empty size": _patched(PLAIN, 124, bytes(12)),
    "size without an end": _patched(PLAIN, 124, b"000000000017"),
    "size after NUL": _patched(PLAIN, 124, b"17\x009999999\x00"),
    "size of letters": _patched(PLAIN, 124, b"0000000001x\0"),
    "base 256": _patched(PLAIN, 124, bytes([0x80]) + (17).to_bytes(11, "big")),
    "no kind": _patched(PLAIN, 156, b"\0"),
    "old folder": _patched(_patched(PLAIN, 156, b"\0"), 0, b"a.jpg/"),
    "file with a slash": _patched(PLAIN, 0, b"a.jpg/"),
    "prefix": _patched(PLAIN, 345, b"some/folder"),
    "full prefix": _patched(PLAIN, 345, b"p" * 155),
    "full name": _patched(PLAIN, 0, b"n" * 100),
    "no name": _patched(PLAIN, 0, bytes(100)),
    "not ASCII": _patched(PLAIN, 0, "größe.jpg".encode()),
    "signed checksum": _patched(PLAIN, 0, "größe.jpg".encode(), signed=True),
}


@pytest.mark.parametrize("header", ODD.values(), ids=ODD)
def test_odd_headers_are_read_as_by_tarfile(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(PLAIN + header + bytes(512) + END)
    assert _listed(path) == _reference(path)
    path.write_bytes(header + bytes(512) + END)
    assert _listed(path) == _reference(path)


def _pax(records: bytes, kind: bytes = b"x") -> bytes:
    member = tarfile.TarInfo("pax")
    member.size, member.type = len(records), kind
    return member.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0")


PAX = {
    "path and size": _pax(b"11 path=b/\n10 size=5\n"),
    "twice": _pax(b"10 path=b\n10 path=c\n"),
    "not UTF-8": _pax(b"10 path=\xff\n"),
    "charset": _pax(b"21 hdrcharset=BINARY\n10 path=\xff\n"),
    "like path": _pax(b"11 pathx=b\n13 path.x=yyy\n"),
    "size of a float": _pax(b"11 size=5.\n"),
    "empty": _pax(b""),
    "a megabyte": _pax(b"1000020 comment=" + b"x" * 1_000_003 + b"\n10 path=b\n"),
    "global path": _pax(b"10 path=b\n", b"g"),
    "global comment": _pax(b"13 comment=b\n", b"g"),
    "before a long name": _pax(b"10 path=b\n") + tarfile.TarInfo("x" * 120).tobuf(tarfile.GNU_FORMAT)[:-512],
}


@pytest.mark.parametrize("header", PAX.values(), ids=PAX)
def test_pax_headers_are_read_as_by_tarfile(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(PLAIN + header + _patched(PLAIN, 124, b"00000000017\0") + bytes(512) + PLAIN + END)
    listed = _listed(path)
    assert listed == _reference(path)
    assert listed != "refused"


@pytest.mark.parametrize("kind", FORMATS)
def test_members_of_more_than_8_gigabytes_are_passed_over(kind: str, tmp_path: Path) -> None:
    """Without reading them: they are holes in the file here. ustar has no notation for such a size."""
    path = tmp_path / "x.tar"
    big = (8 << 30) + (1 if kind != "ustar" else -1)
    with path.open("wb") as file:
        for size in (big, 5):
            member = tarfile.TarInfo(f"{size}.jpg")
            member.size = size
            file.write(member.tobuf(FORMATS[kind]))
            file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(END)
    assert _listed(path) == _reference(path)
    assert [item.size for item in tar_files(path)] == [big, 5]


def test_only_headers_are_read_of_large_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, read = random.Random(0), list[int]()
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(_member(f"{i}.jpg", 100_000, tarfile.GNU_FORMAT, draw) for i in range(50)) + END)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args[1]) or pread(*args))
    assert len(list(tar_files(path))) == 50
    assert sum(read) < 50 * 8192


def test_files_are_listed_as_they_are_found(tmp_path: Path) -> None:
    """The first files of a damaged tar come before its error."""
    draw = random.Random(0)
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(_member(f"{i}.jpg", 700, tarfile.PAX_FORMAT, draw) for i in range(500)) + b"x" * 512)
    files = tar_files(path)
    assert [next(files).name for _ in range(500)] == [f"{i}.jpg" for i in range(500)]
    with pytest.raises(InputError, match="no member and no end"):
        next(files)


def test_a_file_beyond_the_end_is_never_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(PLAIN + _patched(PLAIN, 124, b"00000004001\0") + bytes(512) + END)
    files = tar_files(path)
    assert next(files).size == 0
    with pytest.raises(InputError, match="has 2049 bytes"):
        next(files)
