"""The training benchmark."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import train
from tests.benchmarks.conftest import Run
from tests.benchmarks.test_step import SMALL


def test_training_and_bare_step_are_timed(drawn: Path, tmp_path: Path, run: Run) -> None:
    options = ["--steps", "3", "--runs", "2", "--log_every", "2", "--data.train", str(drawn)]
    options += ["--trace", str(tmp_path / "trace.json.gz")]
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    assert run(train, *SMALL, *options, *files) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    for name in ("training", "step", "ratio", "data_wait_share"):
        assert 0 <= result[name]["min"] <= result[name]["median"] <= result[name]["max"]
    assert 0.05 < result["ratio"]["median"] < 2
    assert result["training"]["median"] == pytest.approx(result["step"]["median"] * result["ratio"]["median"], rel=0.5)
    assert result["backend"].startswith("resident")
    assert result["peak_bytes"] is None
    with gzip.open(tmp_path / "trace.json.gz") as trace:
        events = json.load(trace)["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == 3
    assert "| ratio | " in (tmp_path / "r.md").read_text()
    assert "a line of metrics every 2 steps" in (tmp_path / "r.md").read_text()


def test_wrong_arguments_are_rejected(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--steps", "0"], "--steps 0: give 1 or more"), (SMALL, "data.train is not set")):
        assert run(train, *arguments) == 2
        assert message in capsys.readouterr().err
