"""Parts of the loop that no whole run shows."""

from __future__ import annotations

import threading
from pathlib import Path

from engine.loop import measure_rate
from tests.engine import small


def test_measuring_a_rate_leaves_no_thread_behind(drawn: Path) -> None:
    """Such as a watchdog, which would end the process at some later standstill."""
    before = set(threading.enumerate())
    chosen = small.settings(batch=20)
    chosen.data.train, chosen.data.workers, chosen.cpu = str(drawn), 1, True
    assert measure_rate(chosen, steps=2) > 0
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left, left
