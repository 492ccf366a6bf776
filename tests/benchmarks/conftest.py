"""Fixtures shared by the tests of benchmarks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.engine.conftest import configured_logs

__all__ = ["configured_logs"]
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """(module, *arguments) to the exit status of a benchmark run in this process."""

    def run(module: ModuleType, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        with pytest.raises(SystemExit) as exit_:
            module.main()
        return int(exit_.value.code or 0)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results: a series of two dates."""
    for date, processor, rate in (("2026-01-01", "Old", 3.0), ("2026-02-01", "New", 2.0)):
        result = {"machine": {"processor": processor, "gpu": None}, "rate": rate}
        (tmp_path / f"{date}-speed.json").write_text(json.dumps(result))
    (tmp_path / "2026-02-01-speed.md").write_text(
        "# Speed\n\nNew.\n\n    python -m speed\n\n| | x |\n|---|--:|\n| a | 2 |\n"
    )
    (tmp_path / "notes.txt").write_text("not a result")
    return tmp_path
