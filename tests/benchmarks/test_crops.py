"""The benchmark of crops and augmentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import crops
from tests.benchmarks.conftest import Run


@pytest.mark.slow
def test_crops_and_augmentation_are_timed(drawn: Path, tmp_path: Path, run: Run) -> None:
    arguments = ["--size", "16", "--batch", "20", "--runs", "2", "--kernels", "--json", str(tmp_path / "r.json")]
    assert run(crops, "--data", str(drawn), *arguments) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    taken = result["milliseconds"]
    assert all(0 < taken[name]["min"] <= taken[name]["median"] for name in ("crops", "augmentation"))
    for operations in result["kernels"].values():
        times = [operation["milliseconds"] for operation in operations.values()]
        assert times == sorted(times, reverse=True)
        assert min(times) > 0
    total = taken["crops"]["median"] + taken["augmentation"]["median"]
    assert result["views_per_second"] == pytest.approx(40 / total * 1000)
    assert result["augmented_per_second"] == pytest.approx(40 / taken["augmentation"]["median"] * 1000)
