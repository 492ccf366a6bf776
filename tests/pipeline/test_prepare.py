"""Tests of preparing: unreadable images, the written files, the command and its signals."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import prepare as module
from pipeline.beton import Beton
from pipeline.beton_format import RAW
from pipeline.manifest import Manifest, side_files
from pipeline.prepare import main, prepare
from pipeline.sources import synthetic
from pipeline.storage import unfinished
from pipeline.storage.decode import decode
from pipeline.storage.encode import Settings
from pipeline.storage.journal import Block, Journal
from pipeline.storage.writer import BetonWriter
from pipeline.system.errors import InputError
from tests import ROOT, processes
from tests.pipeline.conftest import pack, parsed_beton, picture, run_command, saved
from tests.side_files import names_of

# ---- unreadable images ----

BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"this is no image\n", "not an image"),
    "truncated JPEG": (saved(picture())[:700], "truncated"),
    "truncated header": (saved(picture())[:30], ""),
    "truncated PNG": (saved(picture(), "png")[:-60], ""),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_is_named_and_leaves_no_output(
    data: bytes, reason: str, workers: int, tmp_path: Path
) -> None:
    source = pack("folder", {"a/1.jpg": saved(picture()), "a/2.jpg": data, "b/3.jpg": saved(picture())}, tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=rf"image a/2\.jpg cannot be stored: .*{reason}.*--skip-bad N"):
        prepare(str(source), tmp_path / "out" / "x.beton", workers=workers, quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path: Path) -> None:
    source = pack("folder", {"1.jpg": saved(picture())}, tmp_path)
    (source / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match=r"image 2\.jpg cannot be stored: cannot be read: No such file"):
        prepare(str(source), tmp_path / "x.beton", workers=1, quiet=True)


def test_a_failure_leaves_an_existing_output_unchanged(small: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (small, *side_files(small))}
    source = pack("folder", {"1.jpg": saved(picture()), "2.jpg": b"no image"}, tmp_path)
    with pytest.raises(InputError):
        prepare(str(source), small, workers=1, quiet=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_existing_output_is_replaced_with_its_manifest(small: Path) -> None:
    prepare("synthetic:5", small, workers=1, quiet=True)
    beton = Beton(small)
    assert len(beton) == 5
    assert beton.manifest is not None
    assert beton.manifest.count == 5


def test_skip_bad_skips_and_lists_bad_images(tmp_path: Path) -> None:
    files = {f"c{i % 2}/{i}.jpg": saved(picture(seed=i)) for i in range(6)}
    files |= {"c0/2.jpg": b"", "c1/5.jpg": b"no image"}
    source = pack("tar", files, tmp_path)
    manifest = prepare(str(source), tmp_path / "x.beton", skip_bad=2, workers=1, quiet=True)
    assert manifest.skipped == [["c0/2.jpg", "the file is empty"], ["c1/5.jpg", "not an image"]]
    names, beton = names_of(tmp_path / "x.beton"), Beton(tmp_path / "x.beton")
    assert names == ["c0/0.jpg", "c0/4.jpg", "c1/1.jpg", "c1/3.jpg"]
    assert beton.labels.tolist() == [0, 0, 1, 1]
    for index, name in enumerate(names):
        assert beton.record(index).tobytes() == files[name]


def test_pillows_warnings_are_not_shown(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = saved(picture().convert("P"), "png", transparency=bytes(range(256)))
    prepare(str(pack("tar", {"1.png": data}, tmp_path)), tmp_path / "x.beton", workers=1, quiet=True)
    assert not recwarn.list


def test_one_bad_image_more_than_allowed_is_an_error(tmp_path: Path) -> None:
    source = pack("folder", {"1.jpg": b"", "2.jpg": b"", "3.jpg": saved(picture())}, tmp_path)
    with pytest.raises(
        InputError, match=r"image 2\.jpg cannot be stored: the file is empty \(1 before it were skipped"
    ):
        prepare(str(source), tmp_path / "x.beton", skip_bad=1, workers=1, quiet=True)


def test_only_bad_images_are_an_error_even_with_skip_bad(tmp_path: Path) -> None:
    source = pack("folder", {"1.jpg": b"", "2.jpg": b""}, tmp_path)
    with pytest.raises(InputError, match="none of its 2 images can be read"):
        prepare(str(source), tmp_path / "x.beton", skip_bad=9, workers=1, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---- the file ----


def test_the_manifest_describes_the_file(tmp_path: Path) -> None:
    files = {f"{'ba'[i % 2]}/{i}.jpg": saved(picture(20 + i, 30, i)) for i in range(7)}
    source, out = pack("zip", files, tmp_path), tmp_path / "x.beton"
    settings = Settings(max_side=300, quality=80)
    returned = prepare(str(source), out, settings, workers=1, quiet=True)
    manifest, file = json.loads((tmp_path / "x.beton.json").read_text("utf-8")), parsed_beton(out)
    assert manifest == returned.__dict__
    assert (file.version, manifest["format"]) == (2, 2)
    beton, names = Beton(out), names_of(out)
    assert beton.crc32 is not None
    assert manifest["count"] == file.count == 7
    assert manifest["file_size"] == len(file.data)
    assert manifest["classes"] == ["a", "b"]
    assert names == sorted(files)
    assert manifest["settings"] == {
        "source": str(source),
        "max_side": 300,
        "quality": 80,
        "mode": "jpg",
        "jpeg_share": 0.5,
        "ignore_exif": False,
        "encode_all": False,
    }
    assert {"python", "ffcv", "numpy", "pillow"} <= set(manifest["versions"])
    assert manifest["header_crc32"] == zlib.crc32(file.data[: file.end] + file.data[file.table :])
    for index, (name, (mode, width, height, pointer, label)) in enumerate(zip(names, file.rows, strict=True)):
        assert file.places[index] == (index, pointer, len(files[name]))
        stored = file.data[pointer : pointer + len(files[name])]
        assert stored == files[name]
        assert beton.crc32[index] == zlib.crc32(stored)
        assert (mode, (width, height)) == (0, Image.open(io.BytesIO(stored)).size)
        assert manifest["classes"][label] == name[0]


def test_colors_are_measured_over_all_pixels_of_each_image(tmp_path: Path) -> None:
    """Each image counts the same, whatever its size; expected from the images' own pixels."""
    images = [np.asarray(picture(20 + 9 * i, 30, i)) for i in range(5)] + [np.full((1, 1, 3), (255, 0, 9), np.uint8)]
    source = pack("folder", {f"{i}.png": saved(Image.fromarray(x), "png") for i, x in enumerate(images)}, tmp_path)
    prepare(str(source), tmp_path / "x.beton", Settings(mode="raw"), workers=1, quiet=True)
    manifest = Beton(tmp_path / "x.beton").manifest
    assert manifest is not None
    values = [image.reshape(-1, 3) / 255 for image in images]
    mean = np.mean([x.mean(axis=0) for x in values], axis=0)
    std = np.mean([((x - mean) ** 2).mean(axis=0) for x in values], axis=0) ** 0.5
    assert manifest.mean == pytest.approx(mean, abs=1e-4)
    assert manifest.std == pytest.approx(std, abs=1e-4)


def test_images_of_one_color_have_a_deviation(tmp_path: Path) -> None:
    source = pack("folder", {"x.png": saved(Image.new("RGB", (9, 9), "red"), "png")}, tmp_path)
    manifest = prepare(str(source), tmp_path / "x.beton", Settings(mode="raw"), workers=1, quiet=True)
    assert (manifest.mean, manifest.std) == ([1.0, 0.0, 0.0], [1e-4] * 3)


def test_undecodable_names_survive(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    source = pack("folder", {name: saved(picture())}, tmp_path)
    manifest = prepare(str(source), tmp_path / "x.beton", workers=1, quiet=True)
    beton = Beton(tmp_path / "x.beton")
    assert beton.manifest == manifest
    assert names_of(tmp_path / "x.beton") == [name]
    assert beton.name(0) == "caf\\udce9.jpg"


def test_the_file_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    files = {f"{i}.png": saved(picture(50 + i, 60, i), "png") for i in range(80)}
    source = pack("tar", files, tmp_path)
    for workers in (1, 2):
        out, settings = tmp_path / f"{workers}.beton", Settings(mode="proportion", max_side=60)
        prepare(str(source), out, settings, workers=workers, quiet=True)
    for suffix in ("beton", "beton.json", "beton.columns"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()


def test_a_limit_takes_images_spread_evenly_over_all_classes(tmp_path: Path) -> None:
    files = {f"{folder}/{i}.jpg": saved(picture(seed=i)) for folder in "abc" for i in range(8)}
    source = pack("tar", files, tmp_path)
    prepare(str(source), tmp_path / "x.beton", limit=6, workers=1, quiet=True)
    assert names_of(tmp_path / "x.beton") == ["a/0.jpg", "a/4.jpg", "b/0.jpg", "b/4.jpg", "c/0.jpg", "c/4.jpg"]
    prepare(str(source), tmp_path / "x.beton", limit=99, workers=1, quiet=True)
    assert names_of(tmp_path / "x.beton") == sorted(files)


# ---- command and signals ----


def test_the_command_writes_the_file_and_describes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.beton"
    options = ("--mode", "raw", "--workers", 1, "--limit", 10, "--max-side", 24)
    assert run_command(main, monkeypatch, "synthetic:40", out, *options) == 0
    assert capsys.readouterr().out == f"{out}: 10 images, 10 classes, 0.0 MiB\n"
    beton = Beton(out)
    assert set(beton.modes.tolist()) == {RAW}
    assert beton.longest_side == 24
    expected = Image.fromarray(synthetic.draw(0, 4)[0]).resize((24, 24), Image.Resampling.BOX)
    assert np.abs(decode(beton, 1) - np.asarray(expected, dtype=float)).mean() < 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere", "{}/x.beton"], "no such file or folder"),
        (["{}/new\nline", "{}/x.beton"], "no such file or folder"),
        (["synthetic:none", "{}/x.beton"], "write synthetic:N"),
        (["synthetic:3", "{}/none/x.beton"], "its folder does not exist: make it with mkdir -p"),
        (["synthetic:3", "{}"], "is a folder: give the name of the file to write"),
        (["synthetic:3", "{}/" + "x" * 252], "cannot be written: File name too long"),
        (["synthetic:3", "{}/x.beton", "--max-side", "-1"], "--max-side -1: give 0"),
        (["synthetic:3", "{}/x.beton", "--max-side", "70000"], "--max-side 70000: give 0"),
        (["synthetic:3", "{}/x.beton", "--quality", "0"], "--quality 0: give 1 to 100"),
        (["synthetic:3", "{}/x.beton", "--jpeg-share", "1.5"], "--jpeg-share 1.5: give 0 to 1"),
        (["synthetic:3", "{}/x.beton", "--jpeg-share", "nan"], "--jpeg-share nan: give 0 to 1"),
        (["synthetic:3", "{}/x.beton", "--limit", "-1"], "must not be negative"),
    ],
)
def test_the_command_refuses_bad_input_with_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(main, monkeypatch, *(argument.replace("{}", str(tmp_path)) for argument in arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_too_long_a_side_is_refused_with_the_remedy(tmp_path: Path) -> None:
    source = pack("folder", {"1.png": saved(Image.new("L", (65501, 1)), "png")}, tmp_path)
    with pytest.raises(InputError, match="65501 pixels a side, the format allows 65500: use --max-side"):
        prepare(str(source), tmp_path / "x.beton", Settings(max_side=0), workers=1, quiet=True)


def _running(processes: list[psutil.Process]) -> list[psutil.Process]:
    running = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


def _started(folder: Path) -> tuple[processes.Process, list[psutil.Process]]:
    """Start the command, wait until it writes into `folder`; return it and its workers."""
    command = [sys.executable, "-m", "pipeline.prepare", "synthetic:20000", str(folder / "x.beton"), "--workers", "2"]
    process = processes.Process(command, cwd=ROOT, new_session=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 500_000 for path in folder.iterdir()):  # the first images are written
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_signal_ends_all_processes_and_leaves_no_output(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process, workers = _started(tmp_path)
    assert len(workers) == 2
    try:
        if number == signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=20)  # ends only with the workers, which have the pipes too
        deadline = time.monotonic() + 10
        while _running(workers) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _running(workers) == []
    finally:
        for worker in _running(workers):
            worker.kill()
    assert process.returncode == status
    assert "Traceback" not in errors
    remaining = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGKILL:  # no process can clean up after it
        assert sorted(remaining) == [".writing-x.beton", ".writing-x.beton.journal"]
    else:
        assert remaining == []


# ---- going on after a crash ----

BLOCK = 16  # images of a block of the journal, here
IMAGES = 5 * BLOCK + 3


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tar of JPEGs and PNGs of several sizes, in no order, two of them unreadable."""
    monkeypatch.setattr("pipeline.storage.writer.BLOCK_IMAGES", BLOCK)
    monkeypatch.setattr("pipeline.storage.unfinished.BLOCK_IMAGES", BLOCK)
    kinds = ("jpeg", "png")
    files = {
        f"{'bac'[i % 3]}/{i}.{kinds[i % 2]}": saved(picture(20 + i % 7, 30, i), kinds[i % 2]) for i in range(IMAGES)
    }
    files |= {"a/1.png": b"", "c/80.jpeg": b"no image"}
    return pack("tar", files, tmp_path)


def _prepare(source: Path, out: Path, workers: int = 1, quality: int = 90, **options: Any) -> Manifest:
    settings = Settings(mode="proportion", max_side=24, quality=quality)
    return prepare(str(source), out, settings, workers=workers, skip_bad=2, quiet=True, **options)


def _die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _at_call(number: int, function: Callable[..., Any], instead: Callable[..., Any] = _die) -> Callable[..., Any]:
    """Return the function, whose call of this number is another one's."""
    calls = itertools.count(1)
    return lambda *args, **options: (instead if next(calls) == number else function)(*args, **options)


def _at_path(name: str, replace: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Return `os.replace` that dies where it would rename a file to this name."""
    return lambda source, path: _die() if Path(path).name == name else replace(source, path)


def _half_a_block(journal: Journal, block: Block) -> NoReturn:
    journal._file.seek(journal._end)
    journal._file.write(block.entries.tobytes()[:100])
    journal._file.flush()
    _die()


def _half_a_manifest(manifest: Manifest, path: Path) -> NoReturn:
    path.write_text('{"count": 8')
    _die()


# What is replaced, by what, and the blocks that the next run need not encode again.
KILLS: dict[str, tuple[Any, str, Callable[[Any], Any], int]] = {
    "in the first block": (module, "_encode_item", lambda f: _at_call(BLOCK // 2, f), 0),
    "in a later block": (module, "_encode_item", lambda f: _at_call(3 * BLOCK + 5, f), 3),
    "in an entry of the journal": (Journal, "append", lambda f: _at_call(3, f, _half_a_block), 2),
    "before an entry of the journal": (Journal, "append", lambda f: _at_call(4, f), 3),
    "in the tables": (BetonWriter, "_table", lambda f: _die, 6),
    "before the columns": (module, "write_columns", lambda f: _die, 6),
    "in the manifest": (Manifest, "write", lambda f: _half_a_manifest, 6),
    "before the renames": (os, "replace", lambda f: _at_path("x.beton", f), 6),
    "between the renames": (os, "replace", lambda f: _at_path("x.beton.columns", f), 0),
}


@pytest.mark.parametrize("place", KILLS)
def test_a_killed_run_goes_on_where_it_was(
    place: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files equal those of a run without a break; at most a block is encoded again."""
    owner, name, replacement, blocks = KILLS[place]
    for folder in ("unbroken", "broken"):
        (tmp_path / folder).mkdir()
    _prepare(mixed, tmp_path / "unbroken" / "x.beton")
    child = os.fork()
    if not child:
        try:
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, replacement(getattr(owner, name)))
                _prepare(mixed, tmp_path / "broken" / "x.beton")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    encoded = _recorded(monkeypatch)
    _prepare(mixed, tmp_path / "broken" / "x.beton")
    assert len(encoded) == max(IMAGES - blocks * BLOCK, 0)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("broken", "unbroken")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the images that are encoded from now on."""
    encoded: list[Any] = []
    encode_item = module._encode_item

    def encode(item: Any, *rest: Any) -> Any:
        encoded.append(item)
        return encode_item(item, *rest)

    monkeypatch.setattr(module, "_encode_item", encode)
    return encoded


def _interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, image: int = 3 * BLOCK + 5) -> None:
    """Run until Ctrl-C at this image."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_encode_item", _at_call(image, module._encode_item, interrupt))
        with pytest.raises(KeyboardInterrupt):
            _prepare(source, out)


def test_workers_go_on_after_another_number_of_workers(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "x.beton"
    _prepare(mixed, tmp_path / "x.beton")
    with caplog.at_level("INFO"):
        _interrupted(mixed, out, monkeypatch)
        assert sorted(path.name for path in out.parent.iterdir()) == [".writing-x.beton", ".writing-x.beton.journal"]
        _prepare(mixed, out, workers=2)
    assert f"{3 * BLOCK} of {IMAGES} images are in {out.parent}/.writing-x.beton: give the same command" in caplog.text
    assert f"resuming after {3 * BLOCK} of {IMAGES} images" in caplog.text
    for path in out.parent.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def _change_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(source, (1, 1))


def _change_code(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "DECODER", "another")


def _remove_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.parent / "out" / ".writing-x.beton").unlink()


def _cut_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(source.parent / "out" / ".writing-x.beton", 4000)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "its settings differ"),
        (_change_source, "its source differ"),
        (_change_code, "its code differ"),
        (_remove_file, "No such file"),
        (_cut_file, "ends before its last record"),
    ],
)
def test_an_unfinished_run_of_other_facts_starts_again_with_a_warning(
    change: Callable[[Path, pytest.MonkeyPatch], None] | None,
    reason: str,
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out" / "x.beton"
    out.parent.mkdir()
    _interrupted(mixed, out, monkeypatch)
    quality = 90 if change else 50
    if change:
        change(mixed, monkeypatch)
    _prepare(mixed, out, quality=quality)
    assert "starting again instead of resuming an unfinished run" in caplog.text
    assert reason in caplog.text
    _prepare(mixed, tmp_path / "y.beton", quality=quality)
    assert out.read_bytes() == (tmp_path / "y.beton").read_bytes()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_a_changed_file_of_a_folder_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a folder each image may change; one that is not stored yet does not matter."""
    monkeypatch.setattr("pipeline.storage.writer.BLOCK_IMAGES", BLOCK)
    monkeypatch.setattr("pipeline.storage.unfinished.BLOCK_IMAGES", BLOCK)
    source = pack("folder", {f"{i:02}.jpg": saved(picture(seed=i)) for i in range(2 * BLOCK)}, tmp_path)
    for index, begins_anew in ((2 * BLOCK - 1, False), (3, True)):
        out = tmp_path / f"{index}.beton"
        with monkeypatch.context() as patched:
            patched.setattr(module, "_encode_item", _at_call(BLOCK + 3, module._encode_item, _raise))
            with pytest.raises(KeyboardInterrupt):
                _prepare(source, out)
        time.sleep(0.02)  # file times are of the clock's ticks
        (source / f"{index:02}.jpg").write_bytes(saved(picture(seed=99)))
        caplog.clear()
        _prepare(source, out)
        assert ("images have changed since" in caplog.text) == begins_anew
        _prepare(source, tmp_path / "unbroken.beton")
        assert out.read_bytes() == (tmp_path / "unbroken.beton").read_bytes()


def _raise(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_an_interrupt_while_resuming_keeps_the_unfinished_beton(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.beton"
    _interrupted(mixed, out, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(unfinished, "_have_changed", _raise)
        with pytest.raises(KeyboardInterrupt):
            _prepare(mixed, out)
    encoded = _recorded(monkeypatch)
    _prepare(mixed, out)
    assert len(encoded) == IMAGES - 3 * BLOCK


def test_no_resume_begins_anew(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.beton"
    _interrupted(mixed, out, monkeypatch)
    encoded = _recorded(monkeypatch)
    _prepare(mixed, out, resume=False)
    assert len(encoded) == IMAGES


def test_an_unreadable_image_leaves_the_ones_before_for_a_run_that_skips_it(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "x.beton"
    with pytest.raises(InputError, match=r"image c/80\.jpeg cannot be stored: .*1 before it were skipped"):
        prepare(str(mixed), out, Settings(mode="proportion", max_side=24), workers=1, skip_bad=1, quiet=True)
    with caplog.at_level("INFO"):
        manifest = _prepare(mixed, out)
    assert f"resuming after {5 * BLOCK} of {IMAGES} images" in caplog.text
    assert [name for name, _ in manifest.skipped] == ["a/1.png", "c/80.jpeg"]


def test_two_runs_do_not_write_one_file(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.beton"
    journal = Journal.open(tmp_path / ".writing-x.beton.journal")
    with pytest.raises(InputError, match="another process writes this file: wait for it"):
        _prepare(mixed, out)
    journal.close()
    assert _prepare(mixed, out).count == IMAGES - 2


def test_a_planted_link_is_not_followed(mixed: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".writing-x.beton.journal").symlink_to(victim)
    with pytest.raises(InputError, match="cannot be written"):
        _prepare(mixed, tmp_path / "x.beton")
    (tmp_path / ".writing-x.beton.journal").unlink()
    (tmp_path / ".writing-x.beton").symlink_to(victim)
    _prepare(mixed, tmp_path / "x.beton")
    assert victim.read_text() == "precious"
