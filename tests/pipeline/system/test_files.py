"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.system.files import atomic_path, write_json, write_whole


def test_a_file_takes_the_place_of_another_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, b"\xff\n")
    assert path.read_bytes() == b"\xff\n"
    write_whole(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_json_has_a_value_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1], "b": None})
    assert (tmp_path / "x.json").read_text() == '{\n "a": [\n  1\n ],\n "b": null\n}\n'


def test_a_path_is_renamed_at_the_end(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x.npy") as temporary:
        temporary.write_bytes(b"1")
        assert os.listdir(tmp_path) == [temporary.name]
        assert temporary.suffix == ".npy"
    assert os.listdir(tmp_path) == ["x.npy"]


def test_a_path_is_removed_after_an_exception(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "x.npy") as temporary:
            temporary.write_bytes(b"2")
            raise KeyboardInterrupt

    (tmp_path / "x.npy").write_bytes(b"1")
    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == ["x.npy"]
    assert (tmp_path / "x.npy").read_bytes() == b"1"
