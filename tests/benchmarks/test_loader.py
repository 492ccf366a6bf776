"""The loader benchmark measures every way to crops and says on what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.paths import PATHS

ROOT = Path(__file__).parents[2]


def test_all_ways_are_measured_and_written_down(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "r.json"
    arguments = ["--size", "32", "--batch", "50", "--runs", "2", "--json", str(out)]
    command = [sys.executable, "-m", "benchmarks.loader", "--data", str(drawn), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["paths"].values()] == list(PATHS)
    for row in result["paths"].values():
        for kind in ("cpu", "wall"):
            assert 0 < row[kind]["min"] <= row[kind]["median"] <= row[kind]["max"]
        base = result["paths"]["ffcv-twice, 1"]
        assert row["ratio"] == pytest.approx(row["cpu"]["median"] / base["cpu"]["median"])
        assert row["peak_bytes"] > 2**20
        assert row["name"] in done.stdout
    crops = 2 * 3 * 32 * 32
    assert result["paths"]["ffcv, 1"]["to_device_bytes"] == crops
    assert result["paths"]["decode-only, 1"]["to_device_bytes"] == 3 * 48 * 48
    assert result["paths"]["resident, 1"]["to_device_bytes"] == result["paths"]["resident, 1"]["read_bytes"] == 0
    assert result["machine"]["versions"]["ffcv"]


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "201"], ["--backends", "ffcv,unknown"], ["--threads", "one"], ["--runs", "0"], ["--views", "-1"]],
)
def test_wrong_arguments_are_refused(arguments: list[str], drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--data", str(drawn), *arguments])
    with pytest.raises(SystemExit) as ended:
        loader.main()
    assert ended.value.code == 2
