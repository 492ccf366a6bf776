"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState

from pipeline.system import logs


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Each test sets up Accelerate anew, whose state is one for the process, and logs to stderr as a command does."""
    logs.configure()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
