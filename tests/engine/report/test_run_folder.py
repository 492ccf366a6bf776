"""Run folders in any state: partial metrics, unreadable settings, names."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.report import page
from engine.report.run_folder import read_runs
from pipeline.system.errors import InputError
from tests.engine.report.conftest import options, text_of
from tests.engine.run_folders import settings, write_run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1, "epoch": 0.5, "loss": 3}\n{"step": 2, "ep', "is cut off"),
        ('junk\n[1]\n{"epoch": "x", "step": 1}\n{"step": 1, "epoch": 0.5, "loss": 3}\n', "3 lines of metrics.jsonl"),
        ('{"step": 1, "epoch": 0.5, "loss": NaN}\n', "Training has not ended"),
        ('{"step": 1, "epoch": 0.5, "loss": 3}\njunk\n', "1 lines of metrics.jsonl"),
        ("", "is empty"),
        ("[" * 100_000, "is cut off"),
        (None, "There is no metrics.jsonl"),
    ],
)
def test_partial_metrics_are_shown(content: str | None, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    report = page.report(read_runs([run, write_run(tmp_path / "b", settings(seed=1))]), None)
    assert message in text_of(report.html)
    assert "curves" in report.pictures


def test_only_finite_metrics_are_read(tmp_path: Path) -> None:
    line = '{"step": 1, "epoch": 0.5, "a": NaN, "b": -Infinity, "c": true, "d": "1", "e": [1], "f": 1%s, "loss": 3}'
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text(line % ("0" * 400) + "\n")
    assert read_runs([run])[0].lines == [{"step": 1.0, "epoch": 0.5, "loss": 3.0}]


@pytest.mark.parametrize(
    "recipe",
    [
        "a: [",
        "- 1",
        "3: {4: 5}",
        "a: &a [1]\nb: *a",
        "!!python/object/apply:os.system [true]",
        "x: " + "[" * 5000,
        None,
    ],
)
def test_unreadable_settings_are_noted(recipe: str | None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "config.yaml").unlink()
    if recipe is not None:
        (run / "config.yaml").write_text(recipe)
    text = text_of(page.report(read_runs([run]), options()).html)
    assert "config.yaml cannot be read" in text or "There is no config.yaml" in text
    assert "1.000" in text  # its loss


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos: not a run folder"):
        read_runs([tmp_path / "photos"])
    with pytest.raises(InputError, match="no such folder"):
        read_runs([tmp_path / "nothing"])


def test_runs_have_the_shortest_distinct_names(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("x/run", "y/run")]
    assert [run.name for run in read_runs([*paths, paths[0] / "..", paths[0]][:2] + [paths[0]])] == ["x/run", "y/run"]
