"""Evaluations that are broken off."""

from __future__ import annotations

import pytest

from engine.evaluate import trainer


def broken_off_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the next evaluation that is kept after each epoch broken off after its first; return the epochs kept."""
    saves: list[int] = []
    unbroken = trainer.Kept.save

    def broken(self: trainer.Kept, epoch: int) -> None:
        unbroken(self, epoch)
        saves.append(epoch)
        if saves == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Kept, "save", broken)
    return saves
