"""The run folder belongs to one run at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.cli import parse
from engine.training.run_folder import RunFolder, check_out
from pipeline.system.errors import InputError
from tests.engine.training.runs import settings


def test_folder_that_cannot_be_written_is_refused(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = replace(settings(drawn, "plain"), out=str(tmp_path / "new" / "run"))
    check_out(chosen)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=r"new/run': Permission denied: choose another folder"):
        check_out(chosen)


def test_claimed_folder_is_refused_until_it_is_closed(drawn: Path, tmp_path: Path) -> None:
    chosen = replace(settings(drawn, "plain"), out=str(tmp_path / "run"))
    first, second = RunFolder(chosen), RunFolder(chosen)
    first.claim()
    first.claim()
    for refused in (second.claim, lambda: check_out(chosen)):
        with pytest.raises(InputError, match="another run is writing into it"):
            refused()
    first.close()
    second.claim()
    second.close()


def test_claim_removes_the_remains_of_a_killed_run(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / ".writing-123-metrics.jsonl").touch()
    (tmp_path / "checkpoints" / ".step_00000001.writing").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    folder = RunFolder(replace(settings(drawn, "plain"), out=str(tmp_path)))
    folder.claim()
    folder.close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "checkpoints", "metrics.jsonl"]


def test_other_run_that_came_since_the_launch_is_refused(drawn: Path, tmp_path: Path) -> None:
    chosen = replace(settings(drawn, "plain"), out=str(tmp_path))
    check_out(chosen)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(InputError, match="already holds a run: add --resume auto"):
        RunFolder(chosen).claim()


def test_config_repeats_the_run(drawn: Path, tmp_path: Path) -> None:
    chosen = replace(settings(drawn, "plain"), out=str(tmp_path), resume="auto", allow_change=["optim.lr"])
    RunFolder(chosen).write_config()
    assert parse(["--config", str(tmp_path / "config.yaml")]) == replace(chosen, resume="", allow_change=[])
