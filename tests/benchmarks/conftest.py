"""Fixtures shared by the tests of benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.engine.conftest import fresh_accelerator

__all__ = ["fresh_accelerator"]
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
