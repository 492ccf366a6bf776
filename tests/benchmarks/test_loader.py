"""The loader benchmark measures both paths and says on what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loader

ROOT = Path(__file__).parents[2]


def test_both_paths_are_measured_and_written_down(drawn: Path, tmp_path: Path) -> None:
    """In a process of its own: FFCV's Loader leaves numba unfit for compiling."""
    arguments = ["--size", "32", "--batch", "50", "--runs", "2", "--json", str(tmp_path / "results" / "r.json")]
    command = [sys.executable, "-m", "benchmarks.loader", "--data", str(drawn), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "r.json").read_text())
    rates = [result[name]["cpu"] for name in ("ours", "ffcv_twice")]
    assert all(0 < rate["min"] <= rate["median"] <= rate["max"] for rate in rates)
    assert result["ratio"] == pytest.approx(rates[0]["median"] / rates[1]["median"])
    assert result["machine"]["versions"]["ffcv"]
    assert f"ratio       {result['ratio']:7.2f}" in done.stdout


def test_a_batch_larger_than_the_data_is_refused(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--data", str(drawn), "--batch", "201"])
    with pytest.raises(SystemExit) as ended:
        loader.main()
    assert ended.value.code == 2
