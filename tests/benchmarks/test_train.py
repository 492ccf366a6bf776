"""The training benchmark sets real training against the bare step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import train
from tests.benchmarks.test_step import SMALL


def test_both_are_measured_and_written_down(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        *SMALL,
        "--data.train",
        str(drawn),
        "--steps",
        "3",
        "--rounds",
        "2",
        "--json",
        str(tmp_path / "r.json"),
        "--markdown",
        str(tmp_path / "r.md"),
        "--log_every",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert not ended.value.code
    result = json.loads((tmp_path / "r.json").read_text())
    for name in ("training", "step", "ratio", "data_wait_share"):
        assert 0 <= result[name]["min"] <= result[name]["median"] <= result[name]["max"]
    assert 0.05 < result["ratio"]["median"] < 2
    assert result["training"]["median"] == pytest.approx(result["step"]["median"] * result["ratio"]["median"], rel=0.5)
    assert result["backend"].startswith("resident")
    assert "| ratio | " in (tmp_path / "r.md").read_text()
    assert "a line of metrics every 2 steps" in (tmp_path / "r.md").read_text()


def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in ((["--steps", "0"], "must be positive"), (SMALL, "data.train is not set")):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as ended:
            train.main()
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
