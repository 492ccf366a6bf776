"""Evaluations that are broken off."""

from __future__ import annotations

import pytest

from engine.probes import training


def broken_off_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the next evaluation that is kept after each epoch broken off after its first; return the epochs kept."""
    saves: list[int] = []
    unbroken = training.Kept.save

    def broken(self: training.Kept, epoch: int) -> None:
        unbroken(self, epoch)
        saves.append(epoch)
        if saves == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Kept, "save", broken)
    return saves
