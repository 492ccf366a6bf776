"""The loader benchmark measures every way to crops and says on what."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loader
from benchmarks.common.paths import COMPARED
from pipeline.beton import Beton
from tests import ROOT


@pytest.mark.slow
def test_ways_are_measured_in_turn_and_written_down(drawn: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "results" / "r.json", ["resident", "ffcv-twice"]
    arguments = ["--backends", ",".join(names), "--size", "32", "--batch", "50", "--runs", "2", "--json", str(out)]
    command = [sys.executable, "-m", "benchmarks.loader", "--data", str(drawn), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["paths"].values()] == names
    for row in result["paths"].values():
        for kind in ("cpu", "wall"):
            assert 0 < row[kind]["min"] <= row[kind]["median"] <= row[kind]["max"]
        base = result["paths"]["ffcv-twice, 1"]
        assert row["ratio"] == pytest.approx(row["cpu"]["median"] / base["cpu"]["median"])
        assert row["peak_bytes"] > 2**20
        assert row["first_batch_seconds"] > 0
        assert row["name"] in done.stdout
    assert result["paths"]["resident, 1"]["read_bytes"] == 0
    assert result["machine"]["versions"]["ffcv"]


@pytest.mark.parametrize("name", [name for name in COMPARED if name != "ffcv-twice"])
def test_each_way_makes_an_epoch_of_crops(name: str, drawn: Path) -> None:
    """FFCV's own is left to a process of its own: its Loader leaves numba unfit for compiling."""
    begun: list[int] = []
    path = COMPARED[name](Beton(drawn), 16, 2, 50, 1, torch.device("cpu"))
    assert path.epoch(lambda: begun.append(1)) == (200 if name == "official" else 400)  # of eight batches at least
    assert begun == [1]
    crops, decoded, stored = 2 * 3 * 16 * 16, 3 * 48 * 48, Beton(drawn).sizes.mean()
    expected = {"ffcv": crops, "dali": stored, "resident": 0, "official": 4 * crops}
    assert path.to_device == expected[name] if name in expected else decoded / 2 < path.to_device < decoded


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "201"], ["--backends", "ffcv,unknown"], ["--threads", "one"], ["--runs", "0"], ["--views", "-1"]],
)
def test_wrong_arguments_are_refused(arguments: list[str], drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--data", str(drawn), *arguments])
    with pytest.raises(SystemExit) as ended:
        loader.main()
    assert ended.value.code == 2


@pytest.mark.slow
def test_a_way_that_fails_is_left_out_and_the_others_are_measured(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = argparse.Namespace(
        data=str(drawn), backends=["unheard-of", "official"], threads=[2], views=2, size=16, batch=50, runs=2
    )
    rows = loader.measure(arguments)
    assert [row["name"] for row in rows.values()] == ["official"]
    assert "unheard-of, 2 threads: failed" in capfd.readouterr().err
    row = rows["official, 2"]
    assert row["note"] in ("(PIL)", "(torchvision)")
    assert row["cpu"]["median"] < 3 * row["wall"]["median"]  # its processes' time is counted too
