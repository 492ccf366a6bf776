"""Tests of journals: blocks are read back up to the first that is not intact, and no byte after it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.journal import ENTRY, Block, Journal
from pipeline.system.errors import InputError

NAME = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")


def _block(first: int, count: int, skipped: list[list[str]]) -> Block:
    entries = np.zeros(count, ENTRY)
    entries["image"] = np.arange(first, first + count)
    entries["pointer"], entries["crc32"], entries["mode"] = 2**40, 2**32 - 1, 1
    return Block(count + len(skipped), entries, skipped)


BLOCKS = [_block(0, 3, []), _block(3, 0, [[NAME, "empty"]]), _block(4, 2, [["x", "y"], ["z", "\x00\n"]])]


def _same(actual: list[Block], expected: list[Block]) -> bool:
    return [(b.images, b.entries.tolist(), b.skipped) for b in actual] == [
        (b.images, b.entries.tolist(), b.skipped) for b in expected
    ]


def _written(path: Path) -> bytes:
    journal = Journal.open(path)
    journal.begin({"source": "x"})
    for block in BLOCKS:
        journal.append(block)
    assert _same(list(journal.blocks()), BLOCKS)
    journal.close()
    return path.read_bytes()


def test_blocks_are_recovered_up_to_the_first_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any byte; the journal then continues after the intact ones."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow
    path = tmp_path / "journal"
    data = _written(path)
    counts = []
    for length in range(0, len(data) + 1, 2):
        path.write_bytes(data[:length])
        journal = Journal.open(path)
        facts = journal.facts()
        assert facts == ({"source": "x"} if b"\n" in data[:length] else {})
        if facts:
            blocks = list(journal.recover())
            assert _same(blocks, BLOCKS[: len(blocks)])
            counts.append(len(blocks))
            journal.append(BLOCKS[0])
            assert _same(list(journal.blocks()), [*blocks, BLOCKS[0]])
        journal.close()
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3}


def test_a_changed_byte_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    data = _written(path)
    for at in range(data.index(b"\n") + 1, len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x81
        path.write_bytes(changed)
        journal = Journal.open(path)
        journal.facts()
        blocks = list(journal.recover())
        assert len(blocks) < 3
        assert _same(blocks, BLOCKS[: len(blocks)])
        journal.close()


def test_blocks_after_a_damaged_one_are_dropped(tmp_path: Path) -> None:
    """Even where a new block takes its place: theirs are records that are written anew."""
    path, blocks = tmp_path / "journal", [_block(first, 3, []) for first in (0, 3, 6, 9)]
    journal = Journal.open(path)
    journal.begin({})
    for block in blocks[:3]:
        journal.append(block)
    journal.close()
    size = len(path.read_bytes()[3:]) // 3
    data = bytearray(path.read_bytes())
    data[3 + size + 20] ^= 1
    path.write_bytes(data)
    journal = Journal.open(path)
    journal.facts()
    assert _same(list(journal.recover()), blocks[:1])
    journal.append(blocks[3])
    journal.close()
    journal = Journal.open(path)
    journal.facts()
    assert _same(list(journal.recover()), [blocks[0], blocks[3]])
    journal.close()


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]\n", b"\xff\xfe\n", b"{" * 100 + b"\n", b"x" * (2 << 20)])
def test_other_files_have_no_facts(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(data)
    journal = Journal.open(tmp_path / "journal")
    assert journal.facts() == {}
    journal.begin({"a": 1})
    assert list(journal.blocks()) == []
    journal.close()


def test_one_process_writes_a_journal_at_a_time(tmp_path: Path) -> None:
    first = Journal.open(tmp_path / "journal")
    with pytest.raises(InputError, match="another process writes this file: wait for it"):
        Journal.open(tmp_path / "journal")
    (tmp_path / "journal").unlink()
    Journal.open(tmp_path / "journal").close()  # a new file
    first.close()
