"""Tests of bounded reading: files of a limited size, plain JSON and YAML, and refusals in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.system.errors import InputError
from pipeline.system.limits import json_lines, parse_yaml, read_bytes, read_json, read_text, read_yaml
from tests.hostile import survived


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5, "mend it") == b"12345"
    with pytest.raises(InputError, match=r"x: 5 bytes, and at most 4 are read: mend it"):
        read_bytes(path, 4, "mend it")
    with pytest.raises(InputError, match=r"none: cannot be read \(No such file or directory\): mend it"):
        read_bytes(tmp_path / "none", 4, "mend it")
    with pytest.raises(InputError, match="cannot be read"):
        read_bytes("a\0b", 4, "mend it")


def _pipe(path: Path) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


@pytest.mark.parametrize("make", [_pipe, lambda _: Path("/dev/zero"), lambda path: path], ids=["pipe", "zero", "dir"])
def test_special_files_are_not_read(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    outcome = survived(lambda _: read_bytes(path, 1 << 40, "mend it"), seconds=5)
    assert outcome.kinds == {"refused": 1}, outcome
    assert "not a regular file" in outcome.messages[0] or "directory" in outcome.messages[0]


def test_an_oversized_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)
    outcome = survived(lambda _: read_json(tmp_path / "x.json", 1 << 20, "mend it"))
    assert outcome.kinds == {"refused": 1}
    assert outcome.mebibytes < 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("\ufefftext".encode(), None),
        ("text".encode("utf-16"), "not UTF-8 text .invalid start byte at byte 0."),
        (b"caf\xe9", "not UTF-8 text"),
        (b"te\0xt", "contains a NUL"),
    ],
)
def test_text_is_utf8(data: bytes, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    if message is None:
        assert read_text(tmp_path / "x", 100, "mend it") == "text"
        return
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / "x", 100, "mend it")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[NaN]", "[Infinity]", "[-Infinity]", '{"a": 1, "a": 2}', "9" * 5000, "", "[1"],
)
def test_json_is_plain(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    outcome = survived(lambda _: read_json(tmp_path / "x", 1 << 20, "mend it"), seconds=10)
    assert outcome.kinds == {"refused": 1}, outcome
    assert "x: not valid JSON" in outcome.messages[0]


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &b [*b]",
        "a: *b",
        "a: !!python/object/apply:os.system [touch owned]",
        "a: !!python/name:os.system ''",
        "!!python/module:os ''",
        "a: !own 3",
        "a: !!str 3",
        "a: ! 3",
        "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system ''",
        "a: 1\na: 2",
        "{a: 1, a: 2}",
        "? [a]\n: 1",
        "--- 1\n--- 2",
        "a: " + "9" * 5000,
        "[" * 60_000,
        "- " * 30_000,
        "{a: " * 15_000,
        "? " * 30_000,
        "a: [",
        "a: '" + "x" * (1 << 16) + "'",
    ],
)
def test_yaml_is_plain(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text(text)
    outcome = survived(lambda _: read_yaml(tmp_path / "x", "mend it"), seconds=20)
    assert outcome.kinds == {"refused": 1}, outcome
    assert outcome.mebibytes < 50
    assert len(outcome.messages[0]) < 700
    assert not (tmp_path / "owned").exists()


def test_yaml_of_plain_values_is_read() -> None:
    text = "a: 1\nb: [1.5, yes, null, 'x']\nc: {d: {e: []}}\ndate: 2001-01-01\nmerge: <<\n"
    read = {"a": 1, "b": [1.5, True, None, "x"], "c": {"d": {"e": []}}, "date": "2001-01-01", "merge": "<<"}
    assert parse_yaml(text) == read


def test_json_lines_end_at_a_truncated_line_and_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": NaN}\n{"a": 3')
    assert [line for line, _ in json_lines(path)] == [b'{"a": 1}\n', b'{"a": NaN}\n']
    for junk in (b"[1]\n", b"\xff\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(b'{"a": 1}\n' + junk + b'{"a": 2}\n')
        assert [said for _, said in json_lines(path)] == [{"a": 1}]
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    outcome = survived(lambda _: list(json_lines(path)))
    assert outcome.kinds == {"refused": 1}
    assert outcome.mebibytes < 20
