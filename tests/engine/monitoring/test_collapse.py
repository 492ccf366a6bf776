"""A collapse is found at its threshold, and warned of once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.monitoring.collapse import PATIENCE, CollapseWatch
from engine.monitoring.embedding_metrics import spread

SPREAD, COLLAPSED = torch.eye(4), torch.ones(4, 4) / 2


def add(watch: CollapseWatch, q: torch.Tensor, steps: int) -> bool:
    """Add steps; return whether a collapse was warned of."""
    for _ in range(steps):
        watch.add(spread(q).item())
    return "COLLAPSE" in (watch.warning() or "")


def test_collapse_begins_at_a_fifth_of_the_spheres_deviation() -> None:
    center = torch.zeros(1, 64)
    center[0, 0] = 1
    torch.manual_seed(0)
    noise = torch.randn(512, 64) / 8
    for share, collapsed in ((0.15, True), (0.25, False)):
        watch = CollapseWatch()
        assert add(watch, F.normalize(center + share * noise, dim=1), PATIENCE) == collapsed


def test_collapse_is_warned_of_once_until_it_ends() -> None:
    watch = CollapseWatch()
    assert not add(watch, COLLAPSED, PATIENCE - 1)
    assert not add(watch, SPREAD, 1)  # the count starts again
    assert not add(watch, COLLAPSED, PATIENCE - 1)
    assert add(watch, COLLAPSED, 1)
    assert not add(watch, COLLAPSED, 5)
    assert not add(watch, SPREAD, 1)
    assert add(watch, COLLAPSED, PATIENCE)
