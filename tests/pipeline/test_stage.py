"""Tests of copies of betons on a local disk."""

from __future__ import annotations

import itertools
import os
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import stage as module
from pipeline.beton import Beton
from pipeline.manifest import columns_path, manifest_path, side_files
from pipeline.prepare import prepare
from pipeline.stage import stage
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError
from tests import processes


def test_a_copy_is_identical_and_made_once(drawn: Path, tmp_path: Path) -> None:
    copy = stage(drawn, tmp_path / "disk")
    assert copy == tmp_path / "disk" / drawn.name
    assert copy.read_bytes() == drawn.read_bytes()
    assert manifest_path(copy).read_bytes() == manifest_path(drawn).read_bytes()
    assert columns_path(manifest_path(copy)).read_bytes() == columns_path(manifest_path(drawn)).read_bytes()
    assert {p.name for p in copy.parent.iterdir()} == {p.name for p in (drawn, *side_files(drawn))}
    written = copy.stat().st_mtime_ns
    assert stage(drawn, tmp_path / "disk") == copy
    assert copy.stat().st_mtime_ns == written
    assert stage(copy, copy.parent) == copy


def test_a_differing_or_broken_copy_is_replaced(drawn: Path, tmp_path: Path) -> None:
    prepare("synthetic:30", tmp_path / drawn.name, workers=1, quiet=True)
    assert stage(drawn, tmp_path).read_bytes() == drawn.read_bytes()
    os.truncate(tmp_path / drawn.name, 5000)
    assert Beton(stage(drawn, tmp_path)).fingerprint == Beton(drawn).fingerprint


def test_a_crash_or_a_full_disk_leaves_the_old_copy(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("synthetic:30", tmp_path / drawn.name, workers=1, quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "disk_usage", lambda path: usage(1000))
        with pytest.raises(InputError, match=r"MiB needed, 0\.0 MiB free"):
            stage(drawn, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    for last in (1, 2, 3):  # of manifest, columns and beton
        with monkeypatch.context() as patched:
            patched.setattr(module.os, "fsync", _failing_at(last))
            with pytest.raises(InputError, match=f"{tmp_path}: No space left"):
                stage(drawn, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _failing_at(call: int) -> Callable[[int], None]:
    calls = itertools.count(1)

    def fail(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")

    return fail


def test_a_killed_copy_is_deleted_and_concurrent_runs_copy_once(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / f".writing-{drawn.name}").write_bytes(b"half")
    call = [sys.executable, "-m", "pipeline.stage", str(drawn), str(tmp_path)]
    both = [processes.Process(call) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [out.strip() for out, _ in outputs] == [str(tmp_path / drawn.name)] * 2
    assert sum("100%" in err for _, err in outputs) == 1  # the other one reused the copy
    assert sorted(p.name for p in tmp_path.iterdir()) == [drawn.name, f"{drawn.name}.columns", f"{drawn.name}.json"]


def test_a_stale_manifest_does_not_outlive_its_beton(drawn: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / drawn.name
    bare.parent.mkdir()
    bare.write_bytes(drawn.read_bytes())
    prepare("synthetic:30", tmp_path / drawn.name, workers=1, quiet=True)
    assert Beton(stage(bare, tmp_path)).manifest is None


def test_a_beton_behind_a_link_is_copied_with_its_columns(drawn: Path, tmp_path: Path) -> None:
    """As in a cache of links to files: its manifest is next to the file."""
    link = tmp_path / "link" / "x.beton"
    link.parent.mkdir()
    link.symlink_to(drawn)
    copy = stage(link, tmp_path / "disk")
    assert sorted(p.name for p in copy.parent.iterdir()) == ["x.beton", "x.beton.columns", "x.beton.json"]
    assert Beton(copy).fingerprint == Beton(drawn).fingerprint


def test_an_unreadable_source_is_named(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def read(self, count: int) -> bytes:
            raise OSError(5, "Input/output error")

    read = module._read
    monkeypatch.setattr(module, "_read", lambda file, source: read(Broken(), source))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{drawn}: Input/output error"):
        stage(drawn, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_path(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, status in ((drawn, 0), (tmp_path / "none.beton", 2)):
        monkeypatch.setattr(sys, "argv", ["stage", str(source), str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == status
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / drawn.name)
    assert "no such file" in shown.err


def test_several_betons_are_copied_one_by_one(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        prepare(f"synthetic:{number}:5", tmp_path / f"part-{number}.beton", workers=1, quiet=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / drawn.name).symlink_to(drawn)
    sources = (f"{tmp_path}/part-*.beton", f"{drawn},{tmp_path}/elsewhere/{drawn.name}")
    for source, folder, status in zip(sources, ("disk", "other"), (0, 2), strict=True):
        monkeypatch.setattr(sys, "argv", ["stage", source, str(tmp_path / folder)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == status
    output = capsys.readouterr()
    assert output.out.splitlines() == [str(tmp_path / "disk" / f"part-{number}.beton") for number in range(2)]
    assert "parts of one name would replace each other: rename them" in output.err
    copy, original = (open_data(folder / "part-*.beton") for folder in (tmp_path / "disk", tmp_path))
    assert copy.fingerprint == original.fingerprint
