"""Tests of the cores and the memory that a process may use."""

from __future__ import annotations

import pytest

from pipeline.system import cores


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ([], 8),
        (["max", "100000"], 8),
        (["1600000", "100000"], 8),
        (["250000", "100000"], 2),
        (["50000", "100000"], 1),
    ],
)
def test_cores_under_a_container_limit(monkeypatch: pytest.MonkeyPatch, limit: list[str], expected: int) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "control_group", lambda _: limit)
    assert cores.available_cores() == expected


def test_free_memory_under_a_container_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory.max": ["5000000"],
        "memory.current": ["3000000"],
        "memory.stat": ["anon", "7", "inactive_file", "500000"],
    }
    monkeypatch.setattr(cores, "control_group", lambda name: files.get(name, []))
    assert cores.free_memory() == 2_500_000
    files["memory.max"] = ["max"]
    assert cores.free_memory() > 2**26
