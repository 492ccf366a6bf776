"""Training on several processes, measured and predicted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.common import processes
from benchmarks.plan import GLOO_BYTES_PER_SECOND, on_cores
from tests.benchmarks.conftest import Run
from tests.benchmarks.test_step import SMALL


@pytest.mark.parametrize(
    ("step", "crops", "processes", "threads", "cores", "expected"),
    [
        (0.010, 0.002, 1, 1, 8, (100, "step")),
        (0.010, 0.002, 4, 1, 8, (50 / (50 / 4 * 0.010 + 0.1), "step")),
        (0.002, 0.010, 1, 1, 8, (100, "loader threads")),
        (0.002, 0.010, 1, 3, 8, (300, "loader threads")),
        (0.010, 0.010, 1, 2, 1, (50, "cores")),
        (0.010, 0.010, 2, 2, 2, (50 / ((50 * 0.020 + 2 * 0.1) / 2), "cores")),
    ],
)
def test_rate_and_limit_on_cores(
    step: float, crops: float, processes: int, threads: int, cores: int, expected: tuple[float, str]
) -> None:
    """A batch of 50, with an exchange of a tenth of a second."""
    rate, limit = on_cores(step, crops, int(GLOO_BYTES_PER_SECOND / 10), 50, processes, threads, cores)
    assert (rate, limit) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.slow
def test_all_setups_are_timed(drawn: Path, tmp_path: Path, run: Run) -> None:
    out = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    settings = ["--data.train", str(drawn), "--data.backend", "ffcv", "--steps", "3", "--runs", "2"]
    assert run(scaling, *SMALL, *settings, *out) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["scaling"]) == len(result["prediction"]) == 4
    for row in (*result["scaling"].values(), *result["prediction"].values()):
        assert 0 < row["rate"]["min"] <= row["rate"]["median"] <= row["rate"]["max"]
    for row in result["prediction"].values():
        assert row["ratio"] == pytest.approx(row["predicted"] / row["rate"]["median"])
    medians = {name: spread["median"] for name, spread in result["efficiency"].items()}
    assert medians.pop("in all") == pytest.approx(math.prod(medians.values()), rel=0.5)  # medians of two runs
    assert "| 2 processes, 2 cores |" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes 0: give numbers from 1"),
        (["--processes", "9999"], "give at most as many"),
        (["--threads", "x"], "--threads x: give numbers from 1"),
        (["--steps", "0"], "--steps 0: give 1 or more"),
        ([], "data.train is not set"),
        (["--data.train", "x", "--data.batch", "9"], "data.batch 9 does not divide among 2"),
    ],
)
def test_wrong_arguments_are_rejected(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Run,
) -> None:
    monkeypatch.setattr(scaling, "available_cores", lambda: 2)
    assert run(scaling, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_group_sets_cores_and_ranks_of_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def popen(call: list[str], **options: Any) -> None:
        started.append((call, options["env"]))

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda _: {3, 5})
    scaling.Group(scaling.Setup("joined", 2, 8, 1, bound=True), ["--seed", "1"], 3, tmp_path)
    scaling.Group(scaling.Setup("separate", 2, 4, 1, separate=True), [], 3, tmp_path)
    assert [call[:3] for call, _ in started[:2]] == [["taskset", "--cpu-list", core] for core in ("3", "5")]
    assert [environment["RANK"] for _, environment in started[:2]] == ["0", "1"]
    assert started[0][1]["MASTER_PORT"] == started[1][1]["MASTER_PORT"]
    assert all("RANK" not in environment for _, environment in started[2:])
    outs = [call[call.index("--out") + 1] for call, _ in started]
    assert len(set(outs)) == 4
