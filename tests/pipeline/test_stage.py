"""Copies of betons on a local disk."""

from __future__ import annotations

import os
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline import stage as module
from pipeline.beton import Beton, manifest_path
from pipeline.errors import InputError
from pipeline.prepare import prepare
from pipeline.stage import stage


def test_a_copy_is_the_same_and_is_made_once(drawn: Path, tmp_path: Path) -> None:
    copy = stage(drawn, tmp_path / "disk", quiet=True)
    assert copy == tmp_path / "disk" / drawn.name
    assert copy.read_bytes() == drawn.read_bytes()
    assert manifest_path(copy).read_bytes() == manifest_path(drawn).read_bytes()
    assert sorted(p.name for p in copy.parent.iterdir()) == sorted([copy.name, manifest_path(copy).name])
    written = copy.stat().st_mtime_ns
    assert stage(drawn, tmp_path / "disk", quiet=True) == copy
    assert copy.stat().st_mtime_ns == written
    assert stage(copy, copy.parent) == copy


def test_another_or_broken_copy_is_replaced(drawn: Path, tmp_path: Path) -> None:
    prepare("synthetic:30", tmp_path / drawn.name, workers=1, quiet=True)
    assert stage(drawn, tmp_path, quiet=True).read_bytes() == drawn.read_bytes()
    os.truncate(tmp_path / drawn.name, 5000)
    assert Beton(stage(drawn, tmp_path, quiet=True)).fingerprint == Beton(drawn).fingerprint


def test_a_crash_or_a_full_disk_leaves_what_was_there(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("synthetic:30", tmp_path / drawn.name, workers=1, quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "disk_usage", lambda path: usage(1000))
        with pytest.raises(InputError, match=r"GiB needed, 0\.0 GiB free"):
            stage(drawn, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        stage(drawn, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
