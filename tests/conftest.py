"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before kernels are defined: they run on CPU tensors
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pipeline.prepare import prepare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


Figure = Callable[[str, str], None]


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """(fault, figure) to a record for the reliability table."""

    def record(fault: str, figure: str) -> None:
        record_property("fault", fault)
        record_property("figure", figure)

    return record


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of 200 drawn images of ten classes, 48 pixels a side. Copy it before changing it."""
    path = tmp_path_factory.mktemp("drawn") / "drawn.beton"
    prepare("synthetic:200", path, workers=1, quiet=True)
    return path
