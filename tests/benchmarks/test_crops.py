"""The benchmark of crops and augmentation measures and writes down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import crops


@pytest.mark.slow
def test_it_measures_and_writes(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--size", "16", "--batch", "20", "--runs", "2", "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["crops", "--data", str(drawn), *arguments])
    with pytest.raises(SystemExit) as ended:
        crops.main()
    assert not ended.value.code
    result = json.loads((tmp_path / "r.json").read_text())
    taken = result["milliseconds"]
    assert all(0 < taken[name]["min"] <= taken[name]["median"] for name in ("crops", "augmentation"))
    together = taken["crops"]["median"] + taken["augmentation"]["median"]
    assert result["views_per_second"] == pytest.approx(40 / together * 1000)
