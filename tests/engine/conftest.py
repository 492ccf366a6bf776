"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from pipeline.system import logs


@pytest.fixture(autouse=True)
def configured_logs() -> None:
    """Each test logs to stderr as a command does."""
    logs.configure()
