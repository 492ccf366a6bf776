"""Parts of the loop that complete runs do not show."""

from __future__ import annotations

from typing import Any

import pytest

from engine.training import build as building
from engine.training import loop
from pipeline.system.errors import InputError
from tests.engine import small


def test_launcher_is_followed_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building may take long, as with `data.verify full`, and a launcher may be killed during it."""
    events: list[str] = []

    def build(*_: Any) -> None:
        events.append("built")
        raise InputError("enough")

    monkeypatch.setattr(building, "follow_launcher", lambda: events.append("followed"))
    monkeypatch.setattr(loop, "build", build)
    with pytest.raises(InputError, match="enough"):
        loop.train(small.settings(batch=20))
    assert events == ["followed", "built"]
