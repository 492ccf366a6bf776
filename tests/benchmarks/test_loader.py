"""The loader benchmark."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loader
from tests import ROOT
from tests.benchmarks.conftest import Run


@pytest.mark.slow
def test_loaders_are_timed_in_turn(drawn: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "results" / "r.json", ["resident", "ffcv-twice"]
    arguments = ["--compare", ",".join(names), "--size", "32", "--batch", "50", "--runs", "2", "--json", str(out)]
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


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "201"], ["--compare", "ffcv,unknown"], ["--threads", "one"], ["--runs", "0"], ["--views", "-1"]],
)
def test_wrong_arguments_are_rejected(arguments: list[str], drawn: Path, run: Run) -> None:
    assert run(loader, "--data", str(drawn), *arguments) == 2


@pytest.mark.slow
def test_a_failed_loader_is_left_out(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = argparse.Namespace(
        data=str(drawn), compare=["unheard-of", "official"], threads=[2], views=2, size=16, batch=50, runs=2
    )
    rows = loader.measure(arguments)
    assert [row["name"] for row in rows.values()] == ["official"]
    assert "unheard-of" in capfd.readouterr().err
    row = rows["official, 2"]
    assert row["note"] in ("(PIL)", "(torchvision)")
    assert row["cpu"]["median"] < 3 * row["wall"]["median"]  # child processes count too
