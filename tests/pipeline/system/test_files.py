"""Tests of files that are written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.system.files import atomic_path, write_atomic, write_json


def test_write_atomic_replaces_a_file_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"\xff\n")
    assert path.read_bytes() == b"\xff\n"
    write_atomic(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert os.listdir(tmp_path) == ["x"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_left_by_a_killed_writer_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".writing-x").write_text("half")
    with atomic_path(tmp_path / "x", unique=False) as temporary:
        assert not temporary.exists()
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_json_has_one_value_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1], "b": None})
    assert (tmp_path / "x.json").read_text() == '{\n "a": [\n  1\n ],\n "b": null\n}\n'
