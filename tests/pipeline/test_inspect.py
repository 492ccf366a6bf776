"""Tests of inspection: the description, the verification, and the preview."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import Beton
from pipeline.beton_format import JPEG, RAW
from pipeline.inspect import _range, describe, main, preview, upgrade, verify
from pipeline.manifest import columns_path, manifest_path
from pipeline.prepare import prepare
from pipeline.storage.encode import Settings
from pipeline.system.errors import InputError
from pipeline.views import AUGMENTATIONS
from tests.pipeline.conftest import pack, picture, run_command, saved
from tests.side_files import copy_side_files, downgrade, names_of

DAMAGED = (3, 77, 199)


def _flip(path: Path, index: int) -> None:
    """Change a byte in the middle of a record."""
    beton = Beton(path)
    at = int(beton.pointers[index]) + int(beton.sizes[index]) // 2
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture
def damaged(drawn: Path, tmp_path: Path) -> Path:
    """A copy of `drawn` with a byte changed in three records."""
    path = tmp_path / "damaged.beton"
    shutil.copy(drawn, path)
    copy_side_files(drawn, path)
    for index in DAMAGED:
        _flip(path, index)
    return path


def test_the_description_has_count_sizes_classes_and_settings(small: Path) -> None:
    beton, text = Beton(small), describe(Beton(small))
    assert text.startswith(f"{small}: 8 images, ")
    assert f"{(beton.modes == JPEG).sum()} JPEG, {(beton.modes == RAW).sum()} raw; bytes {beton.sizes.min()} to" in text
    assert "height 16 to 30 (median 23), width 20 to 41 (median 30)" in text
    assert "2 classes of 4 to 4 images: a, b" in text
    assert "mode proportion" in text
    assert "pillow " in text


def test_the_description_without_a_manifest_counts_labels(bare: Path) -> None:
    text = describe(Beton(bare))
    assert "2 classes of 4 to 4 images: 0, 1" in text
    assert "manifest   none" in text


def test_the_description_shows_a_few_of_many_classes(drawn: Path) -> None:
    assert "10 classes of 20 to 20 images: rows, columns, diagonals, checker, dots, rings, ..." in describe(
        Beton(drawn)
    )


def test_the_description_of_unlabeled_images_says_so(tmp_path: Path) -> None:
    prepare(str(pack("tar", {"1.jpg": saved(picture())}, tmp_path)), tmp_path / "x.beton", workers=1, quiet=True)
    assert "labels     none" in describe(Beton(tmp_path / "x.beton"))


def test_the_description_counts_classes_without_images(tmp_path: Path) -> None:
    prepare("synthetic:4", tmp_path / "x.beton", workers=1, quiet=True)
    assert "10 classes of 0 to 1 images" in describe(Beton(tmp_path / "x.beton"))


def test_the_description_lists_skipped_images_also_of_undecodable_names(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    source = pack("folder", {name: b"", "intact.jpg": saved(picture())}, tmp_path)
    prepare(str(source), tmp_path / "x.beton", skip_bad=1, workers=1, quiet=True)
    assert "skipped    caf\\udce9.jpg: the file is empty" in describe(Beton(tmp_path / "x.beton"))


@pytest.mark.parametrize("label", [2**62, -(2**62)])
def test_forged_labels_take_no_memory_in_the_description(label: int, bare: Path) -> None:
    beton = Beton(bare)
    beton.labels[0] = label
    assert "labels     " in describe(beton)


def test_verification_finds_the_changed_records_and_no_others(damaged: Path) -> None:
    bad = verify(Beton(damaged), quiet=True)
    assert [index for index, _ in bad] == list(DAMAGED)
    assert all("CRC32 differs" in fault for _, fault in bad)


def test_verification_of_an_intact_file_finds_nothing(drawn: Path, small: Path) -> None:
    assert verify(Beton(drawn), quiet=True) == verify(Beton(small), quiet=True) == []


def test_verification_finds_raw_records_that_changed(small: Path) -> None:
    index = Beton(small).modes.tolist().index(RAW)
    _flip(small, index)
    assert [sample for sample, _ in verify(Beton(small), quiet=True)] == [index]


def test_verification_without_a_manifest_finds_a_jpeg_of_other_dimensions(bare: Path) -> None:
    beton = Beton(bare)
    index = beton.modes.tolist().index(JPEG)
    data = bytearray(bare.read_bytes())
    at = data.index(b"\xff\xc0", int(beton.pointers[index])) + 5  # the frame header's height
    assert int.from_bytes(data[at : at + 2], "big") == beton.heights[index]
    data[at : at + 2] = (int(beton.heights[index]) + 8).to_bytes(2, "big")
    bare.write_bytes(data)
    assert verify(Beton(bare), quiet=True) == [
        (index, "its JPEG does not decode, or not to the stored height and width")
    ]


def test_verification_without_a_manifest_finds_a_record_of_zeros(bare: Path) -> None:
    beton = Beton(bare)
    index = beton.modes.tolist().index(JPEG)
    data = bytearray(bare.read_bytes())
    start, size = int(beton.pointers[index]), int(beton.sizes[index])
    data[start : start + size] = bytes(size)
    bare.write_bytes(data)
    assert [sample for sample, _ in verify(Beton(bare), quiet=True)] == [index]


def test_the_command_lists_damaged_records_and_exits_with_1(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, monkeypatch, damaged, "--verify") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("bad:", "verified:"))]
    assert len(lines) == 4
    for line, index in zip(lines, DAMAGED, strict=False):
        assert line.startswith(f"bad: sample {index} (drawn/{index:08d}.jpg): its bytes changed since")
    assert lines[-1] == "verified: 197 of 200 records are intact"


def test_the_command_exits_with_0_for_an_intact_file(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, monkeypatch, drawn, "--verify") == 0
    assert "verified: 200 of 200 records are intact" in capsys.readouterr().out


def test_the_command_draws_a_preview(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "views.png"
    assert run_command(main, monkeypatch, small, "--preview", png, "--size", 32, "--count", 4) == 0
    assert f"preview: {png} (each original with its 2 views)" in capsys.readouterr().out
    picture = Image.open(png)
    assert picture.format == "PNG"
    cell = 3 * 32 + 6  # small views are shown three times as large
    assert 2 * 3 * cell <= picture.width <= 2 * 3 * cell + 40
    assert 2 * cell <= picture.height <= 2 * cell + 20
    assert np.asarray(picture).std() > 20


def test_the_command_draws_changed_views(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One view here, which is the image upside down."""
    png, changes = tmp_path / "views.png", "crop_scale: [1, 1], crop_ratio: [1, 1], hflip: 0, jitter_p: 0, gray_p: 0"
    options = ["--preview", png, "--size", 32, "--count", 1, "--views"]
    shown = []
    for vflip in (0, 1):
        assert run_command(main, monkeypatch, small, *options, f"[{{{changes}, vflip: {vflip}, blur_p: 0}}]") == 0
        shown.append(np.asarray(Image.open(png))[6:102, 108:204].astype(int))
    assert "each original with its 1 view)" in capsys.readouterr().out
    assert np.abs(shown[1] - shown[0][::-1]).max() <= 1
    assert np.abs(shown[1] - shown[0]).max() > 20


def test_a_preview_depends_on_the_seed(small: Path) -> None:
    beton, views = Beton(small), AUGMENTATIONS["moco_v2"]
    first, again, other = (np.asarray(preview(beton, views, size=16, count=3, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_preview_shows_the_originals_unchanged(tmp_path: Path) -> None:
    images = [np.asarray(picture(96, 96, seed)) for seed in range(4)]
    source = pack(
        "folder", {f"{i}.bmp": saved(Image.fromarray(image), "bmp") for i, image in enumerate(images)}, tmp_path
    )
    prepare(str(source), tmp_path / "x.beton", Settings(mode="raw"), workers=1, quiet=True)
    grid = np.asarray(preview(Beton(tmp_path / "x.beton"), AUGMENTATIONS["moco_v2"], size=96, count=12))
    # Two groups side by side, each an original and two views of 96 pixels, 6 pixels apart.
    shown = {grid[y : y + 96, x : x + 96].tobytes() for y in (6, 108) for x in (6, 324)}
    assert shown == {image.tobytes() for image in images}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none.beton"], "no such file: write it with"),
        (["{}/small.beton", "--preview", "{}/none/x.png"], "cannot be written"),
        (["{}/small.beton", "--preview", "{}/x.nothing", "--size", "16"], "give a .png or .jpg file"),
        (["{}/small.beton", "--views", "[{hue: 1}]"], "--views {hue: 1}: choose a number from 0 to 0.5"),
        (["{}/small.beton", "--views", "{hue: 0}"], "--views '{hue: 0}': give 1 to 16 mappings, one for each view"),
        (["{}/small.beton", "--views", "[hue, 1]"], "--views '[hue, 1]': give 1 to 16 mappings"),
        (["{}/small.beton", "--views", "["], "--views '[': give 1 to 16 mappings"),
        (["{}/small.beton", "--views", "[]"], "--views '[]': give 1 to 16 mappings"),
        (["{}/small.beton", "--size", "4"], "--size is 8 to 1024"),
        (["{}/small.beton", "--count", "0"], "--count 1 to 1000"),
        (["{}/small.beton", "--seed", "-1"], "--seed and --epoch 0 or more"),
    ],
)
@pytest.mark.usefixtures("small")
def test_the_command_refuses_bad_input_with_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(main, monkeypatch, *(argument.replace("{}", str(tmp_path)) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_command_refuses_a_manifest_of_wrong_types(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads(manifest_path(small).read_text())
    manifest_path(small).write_text(json.dumps(manifest | {"settings": None}))
    assert run_command(main, monkeypatch, small) == 2
    assert "settings and versions must be objects" in capsys.readouterr().err


def test_verify_checks_the_columns(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = columns_path(manifest_path(small))
    path.write_bytes(path.read_bytes()[:-1] + b"X")  # the last letter of the last name
    assert run_command(main, monkeypatch, small, "--verify") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("bad")] == [
        "bad: column names: its bytes changed since they were written (CRC32 differs)"
    ]


def test_upgrade_rewrites_a_former_manifest_and_nothing_else(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `prepare` would write it today; the fingerprint, which checkpoints contain, stays."""
    expected = {path.name: path.read_bytes() for path in small.parent.iterdir()}
    names, fingerprint = names_of(small), Beton(small).fingerprint
    downgrade(small)
    assert not columns_path(manifest_path(small)).exists()
    assert run_command(main, monkeypatch, small, "--upgrade") == 0
    assert {path.name: path.read_bytes() for path in small.parent.iterdir()} == expected
    assert (names_of(small), Beton(small).fingerprint) == (names, fingerprint)
    assert run_command(main, monkeypatch, small, "--upgrade") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{small}.json: rewritten in the present format",
        f"{small}.json: already has the present format",
    ]


def test_upgrade_leaves_the_former_manifest_where_the_disk_is_full(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downgrade(small)
    before = {path.name: path.read_bytes() for path in small.parent.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.manifest.Manifest.write", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        upgrade(small)
    assert {path.name: path.read_bytes() for path in small.parent.iterdir()} == before


def test_ranges_equal_numpys_in_any_width() -> None:
    rng = np.random.default_rng(0)
    for bits, count in ((8, 1), (16, 2), (16, 70_000), (33, 70_001), (40, 7), (64, 100)):
        values = rng.integers(0, 2**bits - 1, count, dtype=np.uint64)
        middle = np.sort(values)[[(count - 1) // 2, count // 2]]
        assert _range(values) == f"{values.min()} to {values.max()} (median {sum(middle.tolist()) // 2})"


def test_verify_lists_every_record_with_a_bad_pointer(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beton = Beton(drawn)
    start = beton.header_end - beton.metadata.nbytes
    rows = beton.metadata.copy()
    rows["f0"]["data_ptr"][[3, 17]] = 2**60
    path = tmp_path / "forged.beton"
    data = bytearray(drawn.read_bytes())
    data[start : beton.header_end] = rows.tobytes()
    path.write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["inspect", str(path), "--verify"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if line.startswith("bad: ")]
    assert [line.split(":")[1].split(" (")[0] for line in listed] == [" sample 3", " sample 17"]
    assert lines[-1].startswith("verified: 198 of 200 records decode")
