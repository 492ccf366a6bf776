"""Goals, and the count of faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.figures import GOALS, Goal, Results, study_table, withstood
from benchmarks.report import goal_table
from tests import ROOT


@pytest.mark.parametrize(
    ("goal", "measured", "verdict"),
    [
        (Goal("g", 2.0, "speed", lambda f: f["rate"]), "2.00× (New, 2026-02-01), 3.00× (Old, 2026-01-01)", "reached"),
        (Goal("g", 2.5, "speed", lambda f: f["rate"]), None, "not reached on the newest machine"),
        (Goal("g", 3.5, "speed", lambda f: f["rate"]), None, "not reached"),
        (Goal("g", 2.5, "speed", lambda f: f["rate"], most=True), None, "reached"),
        (Goal("g", 2.5, "other", lambda f: f["rate"]), "–", "not measured"),
        (Goal("g", 2.5, "speed", lambda f: None), "–", "not measured"),
    ],
)
def test_goals_are_judged_by_the_newest_result(goal: Goal, measured: str | None, verdict: str, folder: Path) -> None:
    text, judged = goal.judge(Results(folder))
    assert judged == verdict
    assert measured is None or text == measured
    assert f"| g | {goal.bound_text} | {text} | {verdict} |" in goal_table(Results(folder), [goal])


def test_most_goals_are_measured() -> None:
    verdicts = [goal.judge(Results(ROOT / "benchmarks" / "results")) for goal in GOALS]
    assert sum(verdict != "not measured" for _, verdict in verdicts) >= 10


def test_tests_without_a_fault_are_not_counted() -> None:
    rows = [("kill", "ends alike", "as expected"), ("no space", "loud", "failed: x"), ("(a test)", "", "failed: y")]
    faults = [dict(zip(("fault", "expected", "verdict"), row, strict=True)) for row in rows]
    assert withstood({"faults": faults}) == (1, 2)


def test_the_table_of_a_study_has_differences_where_runs_have_bases(tmp_path: Path) -> None:
    base = {"name": "a", "knn": {"mean": 0.4, "deviation": 0.012}}
    term: dict[str, Any] = {"name": "a + b", "knn": {"mean": 0.37, "deviation": None}}
    file = tmp_path / "2026-01-01-study-cifar10-cpu.json"
    file.write_text(json.dumps({"device": "2 cores", "rows": [base, term]}))
    assert study_table(Results(tmp_path)).splitlines()[1:] == ["|---|--:|", "| a | 40.0 ± 1.2 |", "| a + b | 37.0 |"]
    term["differences"] = {"knn": {"mean": -0.03, "low": -0.041, "high": -0.019, "pairs": 3}}
    file.write_text(json.dumps({"device": "2 cores", "rows": [base, term]}))
    heading, *lines = study_table(Results(tmp_path)).splitlines()
    assert heading.endswith("| kNN top-1, % | against its base, points (95 % interval) |")
    assert lines == ["|---|--:|--:|", "| a | 40.0 ± 1.2 |  |", "| a + b | 37.0 | -3.00 (-4.10 to -1.90) |"]
