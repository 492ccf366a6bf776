"""Parts of the loop that complete runs do not show."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from engine.training import loop
from pipeline.system.errors import InputError
from tests.engine import small


def test_launcher_is_followed_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building may take long, as with `data.verify full`, and a launcher may be killed during it."""
    events: list[str] = []

    def build(*_: Any) -> None:
        events.append("built")
        raise InputError("enough")

    monkeypatch.setattr(loop, "follow_launcher", lambda: events.append("followed"))
    monkeypatch.setattr(loop, "build", build)
    with pytest.raises(InputError, match="enough"):
        loop.train(small.settings(batch=20))
    assert events == ["followed", "built"]


def test_measuring_a_rate_leaves_no_thread_behind(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a watchdog, which would end the process at some later standstill."""
    before = set(threading.enumerate())
    chosen = small.settings(batch=20)
    chosen.data.train, chosen.data.workers, chosen.cpu = str(drawn), 1, True
    monkeypatch.setattr(loop, "_RATE_STEPS", 2)
    assert loop.measure_rate(chosen) > 0
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left, left
