"""Parts of the loop that no whole run shows."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.config.settings import Settings
from engine.training import loop
from engine.training.loop import measure_rate
from pipeline.system.errors import InputError
from tests.engine import small


def test_a_launcher_is_followed_before_anything_is_built(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building may take long, as with `data.verify full`, and a launcher may be killed meanwhile."""
    did: list[str] = []

    def build(settings: Settings) -> None:
        did.append("built")
        raise InputError("no more is wanted")

    monkeypatch.setattr(loop, "follow_launcher", lambda: did.append("followed"))
    monkeypatch.setattr(loop, "build", build)
    with pytest.raises(InputError, match="no more is wanted"):
        loop.train(small.settings(batch=20))
    assert did == ["followed", "built"]


def test_measuring_a_rate_leaves_no_thread_behind(drawn: Path) -> None:
    """Such as a watchdog, which would end the process at some later standstill."""
    before = set(threading.enumerate())
    chosen = small.settings(batch=20)
    chosen.data.train, chosen.data.workers, chosen.cpu = str(drawn), 1, True
    assert measure_rate(chosen, steps=2) > 0
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left, left
