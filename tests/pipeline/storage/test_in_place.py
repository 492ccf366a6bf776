"""Tests of folders and tars read in place, against the same images in a beton."""

from __future__ import annotations

import itertools
import os
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backends import BACKENDS
from pipeline.backends.select_backend import choose
from pipeline.beton import Beton
from pipeline.loader import Loader
from pipeline.prepare import prepare
from pipeline.sources import synthetic
from pipeline.storage.in_place import Direct, open_data
from pipeline.system.errors import BadRecords, DamagedRecord, InputError
from pipeline.views import AUGMENTATIONS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "millrace"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty JPEGs of ten classes and several sizes."""
    for number in range(60):
        pixels, label = synthetic.draw(0, number)
        path = tmp_path / "images" / synthetic.CLASSES[label] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 32 + number % 17
        Image.fromarray(pixels).resize((side, 48)).save(path)
    return tmp_path / "images"


@pytest.fixture
def tar(folder: Path, tmp_path: Path) -> Path:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, "images")
    return tmp_path / "images.tar"


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> str:
    """WebDataset: three tars of NAME.jpg and NAME.cls."""
    files = sorted(folder.rglob("*.jpg"))
    for number, part in enumerate(np.array_split(np.arange(len(files)), 3)):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as archive:
            for index in part:
                (tmp_path / "x.cls").write_text(str(index % 7))
                archive.add(files[index], f"{index:06d}.jpg")
                archive.add(tmp_path / "x.cls", f"{index:06d}.cls")
    return str(tmp_path / "shard-*.tar")


def views(data: Beton, backend: str, count: int = 4) -> list[tuple[torch.Tensor, ...]]:
    with closing(Loader(data, AUGMENTATIONS["moco_v2"], size=16, batch=20, workers=1, backend=backend)) as loader:
        epochs = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
        return [(*batch.views, torch.from_numpy(batch.ids)) for batch in itertools.islice(epochs, count)]


def same(a: list[tuple[torch.Tensor, ...]], b: list[tuple[torch.Tensor, ...]]) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tar_is_read_as_its_beton_by_every_backend(backend: str, tar: Path, tmp_path: Path) -> None:
    prepare(str(tar), tmp_path / "x.beton", workers=1, quiet=True)
    beton, direct = Beton(tmp_path / "x.beton"), Direct(tar)
    for name in ("heights", "widths", "labels", "modes"):
        assert np.array_equal(getattr(beton, name), getattr(direct, name)), name
    assert beton.classes == direct.classes
    assert direct.in_one_file
    assert same(views(beton, backend), views(direct, backend))


def test_a_folder_is_read_by_dali(folder: Path, tmp_path: Path) -> None:
    prepare(str(folder), tmp_path / "x.beton", workers=1, quiet=True)
    direct = Direct(folder)
    assert direct.classes == Beton(tmp_path / "x.beton").classes
    assert same(views(Beton(tmp_path / "x.beton"), "dali"), views(direct, "dali"))
    assert choose("auto", direct, torch.device("cpu")).name == "dali"
    with pytest.raises(InputError, match="choose dali"):
        views(direct, "ffcv")


def test_webdataset_shards_have_their_labels(shards: str, folder: Path) -> None:
    direct = Direct(shards)
    assert len(direct) == 60
    assert direct.labels.tolist() == [i % 7 for i in range(60)]
    assert direct.classes == [str(i) for i in range(7)]
    files = sorted(folder.rglob("*.jpg"))
    assert direct.record(41).tobytes() == files[41].read_bytes()
    assert views(direct, "dali")


def test_the_index_is_cached_until_a_file_changes(tar: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Direct(tar)
    assert len(list(cache.glob("direct-*.sides"))) == 1
    monkeypatch.setattr("pipeline.storage.in_place._read_sides", lambda items: pytest.fail("read again"))
    again = Direct(tar)
    assert np.array_equal(first.heights, again.heights)
    assert first.fingerprint == again.fingerprint
    tar.touch()
    with pytest.raises(pytest.fail.Exception, match="read again"):
        Direct(tar)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert Direct(tar).fingerprint == first.fingerprint  # the images are the same


def test_an_unusable_cache_is_ignored(tar: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Direct(tar)
    (sides,) = cache.glob("direct-*.sides")
    sides.write_bytes(b"junk")
    assert len(Direct(tar)) == 60
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(Direct(tar)) == 60


def test_other_images_are_refused_or_skipped(folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    Image.new("RGB", (9, 9)).save(folder / names[3].replace(".jpg", ".png"))
    (folder / names[3]).unlink()
    Image.new("CMYK", (9, 9)).save(folder / names[8], "jpeg")
    (folder / names[20]).write_bytes(b"")
    with pytest.raises(BadRecords, match=r"not an RGB or gray JPEG \(3 such images\): write a beton"):
        Direct(folder)
    tolerant = Direct(folder, tolerate=True)
    assert tolerant.unreadable == {3, 8, 20}
    with closing(
        Loader(tolerant, AUGMENTATIONS["moco_v2"], size=16, batch=60, workers=1, backend="dali", on_bad="skip")
    ) as loader:
        batch = next(iter(loader))
    assert sorted(batch.ids.tolist()) == sorted({3: 4, 8: 9, 20: 21}.get(i, i) for i in range(60))


def test_exif_orientation_is_ignored(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    direct = Direct(folder)
    Image.new("RGB", (30, 40)).save(folder / direct.name(5), exif=exif)
    again = Direct(folder)
    assert (again.heights[5], again.widths[5]) == (40, 30)
    assert sorted(i for *_, ids in views(again, "dali", 3) for i in ids.tolist()) == list(range(60))


def test_a_damaged_jpeg_is_named(folder: Path) -> None:
    direct = Direct(folder)
    path = folder / direct.name(7)
    path.write_bytes(path.read_bytes()[:400] + bytes(300))
    with pytest.raises(DamagedRecord, match="sample 7 "):
        views(Direct(folder), "dali")


@pytest.mark.parametrize(("source", "kind"), [("x.beton", Beton), ("images", Direct), ("images.tar", Direct)])
def test_open_data_recognizes_betons_folders_and_tars(
    source: str, kind: type, folder: Path, tar: Path, tmp_path: Path
) -> None:
    prepare(str(folder), tmp_path / "x.beton", workers=1, quiet=True)
    assert type(open_data(tmp_path / source)) is kind


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    for source in ("nowhere.tar", "shard-*.tar", "nowhere"):
        with pytest.raises(InputError, match="no such"):
            open_data(tmp_path / source)


def test_an_image_changed_in_place_is_read_again(folder: Path, cache: Path) -> None:
    victim = next(folder.rglob("0007.jpg"))
    before = Direct(folder)
    at = [before.name(index).endswith("0007.jpg") for index in range(60)].index(True)
    data = victim.read_bytes()
    os.utime(victim, ns=(1, 1))  # same bytes, other time; the time of its folder does not change
    Direct(folder)
    assert len(list(cache.iterdir())) == 2
    assert (before.heights[at], before.widths[at]) == (48, 32 + 7)
    assert data == victim.read_bytes()


def test_an_image_too_large_for_its_file_is_refused(folder: Path) -> None:
    victim = next(folder.rglob("0007.jpg"))
    data = bytearray(victim.read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\x4e\x20\x4e\x20"  # 20000 by 20000
    victim.write_bytes(data)
    with pytest.raises(BadRecords, match=r"0007\.jpg"):
        Direct(folder)
    assert len(Direct(folder, tolerate=True).unreadable) == 1


def test_several_tars_of_class_folders_have_common_labels(folder: Path, tmp_path: Path) -> None:
    """Also if each has other classes."""
    parts = sorted(folder.iterdir())
    for number, chosen in enumerate((parts[:3], parts[3:])):
        with tarfile.open(tmp_path / f"part-{number}.tar", "w") as archive:
            for part in chosen:
                archive.add(part, part.name)
    split, single = Direct(tmp_path / "part-*.tar"), Direct(folder)
    assert split.classes == single.classes
    names = {Path(single.name(i)).name: int(label) for i, label in enumerate(single.labels)}
    assert [names[Path(split.name(i)).name] for i in range(60)] == split.labels.tolist()


def test_a_tar_whose_name_looks_like_a_pattern_is_a_tar(tar: Path) -> None:
    other = tar.rename(tar.with_name("data[1].tar"))
    assert len(open_data(other)) == 60


def test_a_huge_label_is_refused(shards: str, tmp_path: Path) -> None:
    (tmp_path / "x.cls").write_text("9" * 20)
    with tarfile.open(tmp_path / "shard-0.tar", "a") as archive:
        archive.add(tmp_path / "x.cls", "000000.cls")
    with pytest.raises(InputError, match=r"000000\.cls has label 9+"):
        Direct(shards)


def test_braces_expand_to_shards(shards: str) -> None:
    """The notation is WebDataset's."""
    named = shards.replace("*", "{0..2}")
    assert named != shards
    expanded, matched = Direct(named), Direct(shards)
    assert [expanded.name(i) for i in range(60)] == [matched.name(i) for i in range(60)]
    assert len(Direct(shards.replace("*", "{0,2}"))) == 40
    with pytest.raises(InputError):
        Direct(shards.replace("*", "{0..3}"))


@pytest.mark.parametrize("source", ["x.zip", "synthetic:64"])
def test_other_sources_are_refused_with_the_remedy(source: str) -> None:
    with pytest.raises(InputError, match=r"pipeline\.prepare"):
        open_data(source)


def test_a_folder_of_tars_is_refused(shards: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for path in tmp_path.glob("shard-*.tar"):
        path.rename(tmp_path / "shards" / path.name)
    with pytest.raises(InputError, match=r"has no image but 3 tars: name these, .*/shards/\*\.tar"):
        open_data(tmp_path / "shards")
