"""Tests of image sources: images and classes of folders, tars and zips, their bytes, and refusals."""

from __future__ import annotations

import gzip
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.prepare import prepare
from pipeline.sources import synthetic
from pipeline.sources.archives import open_source
from pipeline.system.errors import InputError
from tests.pipeline.conftest import KINDS, pack, picture, saved, tar_bytes

JPEG = saved(picture())


def _files(*names: str) -> dict[str, bytes]:
    return {name: f"bytes of {name}".encode() for name in names}


def listed(source: Path, subset: str | None = None) -> tuple[dict[str, int], list[str]]:
    images = open_source(str(source), subset)
    return {item.name: item.label for item in images.items}, images.classes


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_sorted_classes_and_bytes_are_unchanged(kind: str, tmp_path: Path) -> None:
    files = _files("dog/2.jpg", "cat/b.PNG", "cat/a.jpeg", "ant/deep/x.jpg", "dog/notes.txt")
    source = open_source(str(pack(kind, files, tmp_path)))
    assert source.classes == ["ant", "cat", "dog"]
    assert [(item.name, item.label) for item in source.items] == [
        ("ant/deep/x.jpg", 0),
        ("cat/a.jpeg", 1),
        ("cat/b.PNG", 1),
        ("dog/2.jpg", 2),
    ]
    assert all(item.read() == files[item.name] for item in source.items)


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_no_folder_are_unlabeled(kind: str, tmp_path: Path) -> None:
    assert listed(pack(kind, _files("b.jpg", "a.jpg"), tmp_path)) == ({"a.jpg": -1, "b.jpg": -1}, [])


@pytest.mark.parametrize("kind", KINDS)
def test_names_with_spaces_and_unicode_are_preserved(kind: str, tmp_path: Path) -> None:
    files = _files("Île verte/größe 1.jpg", "猫 と/ねこ 'two'.jpg")
    source = open_source(str(pack(kind, files, tmp_path)))
    assert source.classes == ["Île verte", "猫 と"]
    assert {item.name: item.read() for item in source.items} == files


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_folder_around_all_classes_is_no_class(kind: str, tmp_path: Path) -> None:
    labels, classes = listed(pack(kind, _files("set/images/cat/1.jpg", "set/images/dog/2.jpg"), tmp_path))
    assert classes == ["cat", "dog"]
    assert labels == {"set/images/cat/1.jpg": 0, "set/images/dog/2.jpg": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_files_and_those_of_macos_are_ignored(kind: str, tmp_path: Path) -> None:
    files = _files("cat/1.jpg", "cat/._1.jpg", ".cache/2.jpg", "__MACOSX/cat/1.jpg", "dog/.trash/3.jpg", "dog/4.jpg")
    assert listed(pack(kind, files, tmp_path)) == ({"cat/1.jpg": 0, "dog/4.jpg": 1}, ["cat", "dog"])


@pytest.mark.parametrize("kind", ["tar", "zip", "deflated zip"])
def test_members_written_with_a_leading_dot_are_found_and_read(kind: str, tmp_path: Path) -> None:
    source = open_source(str(pack(kind, {"./cat/1.jpg": b"one", "./dog/2.jpg": b"two"}, tmp_path)))
    assert {item.name: (item.label, item.read()) for item in source.items} == {
        "cat/1.jpg": (0, b"one"),
        "dog/2.jpg": (1, b"two"),
    }


SPLIT = ("set/train/cat/1.jpg", "set/train/dog/2.jpg", "set/test/cat/3.jpg", "set/test/dog/4.jpg")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_subset_can_be_chosen(kind: str, wrapped: bool, tmp_path: Path) -> None:
    names = [name if wrapped else name.removeprefix("set/") for name in SPLIT]
    source = pack(kind, _files(*names), tmp_path)
    assert listed(source, "train") == ({names[0]: 0, names[1]: 1}, ["cat", "dog"])
    assert listed(source, "test") == ({names[2]: 0, names[3]: 1}, ["cat", "dog"])


def test_a_flat_subset_is_unlabeled(tmp_path: Path) -> None:
    source = pack("folder", _files("train/cat/1.jpg", "train/dog/2.jpg", "unlabeled/3.jpg"), tmp_path)
    assert listed(source, "unlabeled") == ({"unlabeled/3.jpg": -1}, [])


def test_the_only_subset_is_the_default(tmp_path: Path) -> None:
    source = pack("folder", _files("train/cat/1.jpg", "train/dog/2.jpg"), tmp_path)
    assert listed(source) == listed(source, "train") == ({"train/cat/1.jpg": 0, "train/dog/2.jpg": 1}, ["cat", "dog"])


def test_several_subsets_are_refused_unless_one_is_chosen(tmp_path: Path) -> None:
    source = pack("folder", _files(*SPLIT), tmp_path)
    with pytest.raises(InputError, match=r"has test, train: choose one of them with --subset") as error:
        open_source(str(source))
    assert str(source) in str(error.value)


def test_an_unknown_subset_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder 'val' in it: it has test, train; choose --subset"):
        open_source(str(pack("folder", _files(*SPLIT), tmp_path)), "val")


def test_a_tar_of_class_tars_is_read_in_place(tmp_path: Path) -> None:
    classes = {
        "n02": {"n02_7.JPEG": b"seven" * 300, "n02_1.JPEG": b"one"},
        "n01": {"n01_9.JPEG": b"nine" * 500},
    }
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_bytes({f"{name}.tar": tar_bytes(files) for name, files in classes.items()}))
    source = open_source(str(path))
    assert source.classes == ["n01", "n02"]
    assert [(item.name, item.label, item.read()) for item in source.items] == [
        ("n01/n01_9.JPEG", 0, b"nine" * 500),
        ("n02/n02_1.JPEG", 1, b"one"),
        ("n02/n02_7.JPEG", 1, b"seven" * 300),
    ]
    assert {item.path for item in source.items} == {str(path)}
    assert list(tmp_path.iterdir()) == [path]


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    source = pack("folder", _files("cat/1.jpg"), tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.jpg").write_bytes(b"two")
    (source / "dog").symlink_to(tmp_path / "elsewhere")
    assert listed(source) == ({"cat/1.jpg": 0, "dog/2.jpg": 1}, ["cat", "dog"])


def _missing(folder: Path) -> Path:
    return folder / "nowhere"


def _empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _folder_without_images(folder: Path) -> Path:
    return pack("folder", _files("cat/readme.txt"), folder)


def _gzipped(folder: Path) -> Path:
    path = folder / "images.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(_files("cat/1.jpg"))))
    return path


def _gzipped_but_named_tar(folder: Path) -> Path:
    return _gzipped(folder).rename(folder / "images.tar")


def _text_file(folder: Path) -> Path:
    (folder / "list.txt").write_text("cat/1.jpg\n")
    return folder / "list.txt"


def _cut_zip(folder: Path) -> Path:
    path = pack("zip", _files("cat/1.jpg", "dog/2.jpg"), folder)
    path.write_bytes(path.read_bytes()[:-30])
    return path


def _empty_zip(folder: Path) -> Path:
    (folder / "images.zip").write_bytes(b"")
    return folder / "images.zip"


def _encrypted_zip(folder: Path) -> Path:
    path = pack("zip", _files("cat/1.jpg"), folder)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag in the member's entry of the directory
    path.write_bytes(data)
    return path


def _lzma_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cat/1.jpg", b"one")
    return folder / "images.zip"


def _empty_tar(folder: Path) -> Path:
    (folder / "images.tar").write_bytes(b"")
    return folder / "images.tar"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "no such file or folder: give an image folder"),
        (_empty_folder, "no image in it: give"),
        (_folder_without_images, "no image in it: give"),
        (_gzipped, "decompress it to a plain .tar"),
        (_gzipped_but_named_tar, "not an intact, uncompressed tar file .*: fetch it again or decompress it"),
        (_text_file, "not a folder, .tar or .zip: unpack it"),
        (_cut_zip, "not an intact zip file .*: fetch it again"),
        (_empty_zip, "not an intact zip file .*: fetch it again"),
        (_encrypted_zip, "cat/1.jpg is encrypted or not deflated: unpack it"),
        (_lzma_zip, "cat/1.jpg is encrypted or not deflated: unpack it"),
        (_empty_tar, "not an intact, uncompressed tar file .*: fetch it again"),
    ],
)
def test_invalid_sources_are_refused_with_the_remedy(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        open_source(str(path))
    assert str(error.value).startswith(str(path))


def _third_header(data: bytes, folder: Path) -> int:
    (folder / "full.tar").write_bytes(data)
    with tarfile.open(folder / "full.tar") as tar:
        return tar.getmembers()[2].offset


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fault", ["cut before a header", "cut in a header", "cut in a file", "header changed"])
def test_a_damaged_tar_is_refused(nested: bool, fault: str, tmp_path: Path) -> None:
    data = tar_bytes({f"{'' if nested else 'cat/'}{i}.jpg": bytes([i]) * 700 for i in range(5)})
    at = _third_header(data, tmp_path)
    length = {"cut before a header": 0, "cut in a header": 99, "cut in a file": 600}.get(fault, len(data))
    damaged = bytearray(data[: at + length])
    if fault == "header changed":
        damaged[at + 1] ^= 0x55
    path = tmp_path / "images.tar"
    path.write_bytes(tar_bytes({"n01.tar": bytes(damaged)}) if nested else damaged)
    with pytest.raises(InputError, match=r"images\.tar: not an intact, uncompressed tar file .*: fetch it again"):
        open_source(str(path))


@pytest.mark.parametrize("kind", ["zip", "deflated zip"])
def test_a_damaged_zip_member_is_named(kind: str, tmp_path: Path) -> None:
    path = pack(kind, {"cat/1.jpg": JPEG, "cat/2.jpg": saved(picture(seed=1))}, tmp_path)
    with zipfile.ZipFile(path) as archive:
        member = archive.infolist()[1]
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cat/2\.jpg cannot be stored: cannot be read: damaged in the zip"):
        prepare(str(path), tmp_path / "out.beton", workers=1, quiet=True)


def test_several_processes_can_read_one_zip(tmp_path: Path) -> None:
    files = {f"c{i % 3}/{i:03d}.jpg": synthetic.jpeg(1, i) for i in range(150)}
    path = pack("zip", files, tmp_path)
    for workers in (1, 2):
        prepare(str(path), tmp_path / f"{workers}.beton", workers=workers, quiet=True)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pack("folder", _files("cat/1.jpg", "dog/2.jpg"), tmp_path)
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"source/dog: cannot be listed .Permission denied.: make the folder readable"):
        open_source(str(source))


@pytest.mark.parametrize(("source", "numbers"), [("synthetic:12", range(12)), ("synthetic:95:12", range(95, 107))])
def test_synthetic_sources_have_the_images_of_their_numbers(source: str, numbers: range) -> None:
    images = open_source(source)
    assert images.classes == list(synthetic.CLASSES)
    assert [item.label for item in images.items] == [number % 10 for number in numbers]
    assert [item.read() for item in images.items] == [synthetic.jpeg(0, number) for number in numbers]
    assert len({item.name for item in images.items}) == len(numbers)


@pytest.mark.parametrize("source", ["", "0", "-3", "ten", "1.5", "1:2:3", "5:0", ":4", "4:", "1e3", "²", " 4"])
def test_malformed_synthetic_sources_are_refused(source: str) -> None:
    with pytest.raises(InputError, match="write synthetic:N, N images, or synthetic:FIRST:N"):
        open_source(f"synthetic:{source}")
