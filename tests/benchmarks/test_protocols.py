"""The comparison of evaluation protocols."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import protocols
from tests.benchmarks.conftest import Run
from tests.engine import test_run

TOP1 = {"knn": 0.3, "fast": 0.41, "moco": 0.40, "moco_v3": 0.38, "semi": 0.2}


Compare = Callable[..., int]


class Evaluations:
    """Replaces the evaluations' processes: records their calls, and writes their results."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[list[str]] = []
        self.failing = failing

    def __call__(self, call: list[str]) -> Any:
        self.calls.append(call)
        kind = call[call.index("--protocol") + 1] if "--protocol" in call else call[3]
        if kind == self.failing:
            return SimpleNamespace(returncode=1)
        out = Path(call[call.index("--out") + 1])
        out.mkdir(parents=True)
        result = {"top1": TOP1[kind], "top5": 0.9, "interval": [0.1, 0.5], "seconds": 3.2}
        result |= {"architecture": "resnet18", "checkpoint": call[4], "images": 20, "train": "a", "test": "b"}
        (out / "x.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=0)


@pytest.fixture
def compare(run: Run, monkeypatch: pytest.MonkeyPatch) -> Compare:
    def compare(evaluations: Evaluations, *arguments: str) -> int:
        monkeypatch.setattr(protocols.subprocess, "run", evaluations)
        return run(protocols, "e.pth", "--train", "a", "--test", "b", *arguments)

    return compare


def test_every_protocol_runs_once_with_the_given_options(compare: Compare, tmp_path: Path) -> None:
    evaluations, more = Evaluations(), ["--out", str(tmp_path / "out"), "--precision", "no"]
    assert compare(evaluations, *more) == 0
    assert len(evaluations.calls) == len(protocols.PROTOCOLS)
    assert all(call[-2:] == ["--test", "b"] and "--precision" in call for call in evaluations.calls)
    assert compare(evaluations, *more) == 0
    assert len(evaluations.calls) == len(protocols.PROTOCOLS)


def test_results_of_other_data_or_encoders_are_rejected(
    compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--only", "kNN"]
    assert compare(Evaluations(), *out) == 0
    file = tmp_path / "out" / "kNN" / "x.json"
    for key in ("checkpoint", "train", "test"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {key: "other"}))
        assert compare(Evaluations(), *out) == 2
        assert "choose another --out" in capsys.readouterr().err
        file.write_text(json.dumps(result))


def test_a_failed_evaluation_ends_the_command_and_runs_again_next_time(
    compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--only", "kNN", "moco"]
    failing, working = Evaluations("moco"), Evaluations()
    assert compare(failing, *out) == 1
    assert "moco: the evaluation failed" in capsys.readouterr().err
    assert compare(working, *out) == 0
    assert ["--protocol" in call for call in working.calls] == [True]


def test_distances_are_between_linear_classifiers(compare: Compare, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    only = ["--only", "kNN", "fast, center crops", "moco", "moco_v3"]
    assert compare(Evaluations(), "--out", str(tmp_path / "out"), *only, *files) == 0
    lines = (tmp_path / "r.md").read_text().splitlines()
    rows = {cells[0]: cells for line in lines if line.startswith("| ") for cells in [line.strip("| ").split(" | ")]}
    assert rows["fast, center crops"][4:] == ["+1.0", "+3.0", "3"]
    assert rows["moco"][4:] == ["+0.0", "+2.0", "3"]
    assert [cell.strip() for cell in rows["kNN"][4:]] == ["", "", "3"]
    assert json.loads((tmp_path / "r.json").read_text())["protocols"]["moco_v3"]["top1"] == 0.38


@pytest.mark.slow
def test_protocols_are_compared_on_an_encoder(drawn: Path, tmp_path: Path) -> None:
    import torch

    from methods.encoders import resnet

    torch.save(resnet("resnet18", stem="small", width=0.25).state_dict(), tmp_path / "encoder.pth")
    options = ["--train", str(drawn), "--test", str(drawn), "--out", str(tmp_path / "out"), "--size", "16", "--cpu"]
    command = (sys.executable, "-m", "benchmarks.protocols", str(tmp_path / "encoder.pth"))
    done = test_run.run(*options, "--only", "kNN", "fast, 1 pass", "semi, 10 %", command=command)
    assert done.returncode == 0, done.stderr
    assert "semi, 10 %" in done.stdout
    assert len(list((tmp_path / "out").glob("*/*.json"))) == 3
