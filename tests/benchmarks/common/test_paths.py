"""Every loader of the loader benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.common.paths import COMPARED
from pipeline.beton import Beton


@pytest.mark.parametrize("name", [name for name in COMPARED if name != "ffcv-twice"])
def test_each_loader_yields_an_epoch_of_crops(name: str, drawn: Path) -> None:
    """FFCV's own Loader is left out: after it, numba fails to compile in this process."""
    first_batches: list[int] = []
    path = COMPARED[name](Beton(drawn), 16, 2, 50, 1, torch.device("cpu"))
    assert path.epoch(lambda: first_batches.append(1)) == (200 if name == "official" else 400)  # eight batches or more
    assert first_batches == [1]
    crops, decoded, stored = 2 * 3 * 16 * 16, 3 * 48 * 48, Beton(drawn).sizes.mean()
    expected = {"ffcv": crops, "dali": stored, "resident": 0, "official": 4 * crops}
    assert path.to_device == expected[name] if name in expected else decoded / 2 < path.to_device < decoded
