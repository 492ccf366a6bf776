"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before kernels are defined: they run on CPU tensors
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pipeline.prepare import prepare
from tests import processes


def pytest_configure(config: pytest.Config) -> None:
    """Start the server that processes are forked from, for all workers of pytest-xdist; alone, the first use does."""
    if getattr(config.option, "numprocesses", None):
        processes.start_server()


def pytest_unconfigure() -> None:
    processes.stop_server()


_WAITING = (
    "test_demo.py",
    "test_stops.py",
    "test_watchdog.py",
    "test_preemption.py",
    "test_elastic.py",
    "test_heartbeat.py",
    "test_hosts.py",
    "test_run.py",
)
"""Files of tests that wait most of their time, the longest first."""


def _place(item: pytest.Item) -> int:
    """Return the place of a test's file among those that wait; tests that compute come after all of them."""
    return _WAITING.index(item.path.name) if item.path.name in _WAITING else len(_WAITING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that wait first; skip tests marked `gpu` where there is no GPU.

    pytest-xdist gives each worker a contiguous part of the tests: one waits while the others compute, and none waits at
    the end. The order within a file stays.
    """
    items.sort(key=_place)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _reset_accelerate() -> None:
    """Forget Accelerate's state, which is one for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Each test sets up Accelerate again."""
    _reset_accelerate()
    yield
    _reset_accelerate()


Figure = Callable[[str, str], None]


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """(fault, figure) to a record for the reliability table."""

    def record(fault: str, figure: str) -> None:
        record_property("fault", fault)
        record_property("figure", figure)

    return record


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` has filled: the first of pytest's workers to ask does it, for all. Change no file."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    folder = (factory.getbasetemp() if alone else factory.getbasetemp().parent) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            temporary = factory.mktemp(name)
            make(temporary)
            temporary.rename(folder)
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of 200 drawn images of ten classes, 48 pixels a side. Copy it before changing it."""

    def make(folder: Path) -> None:
        prepare("synthetic:200", folder / "drawn.beton", workers=1, quiet=True)

    return made_once(tmp_path_factory, "drawn", make) / "drawn.beton"
