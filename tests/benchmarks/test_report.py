"""The page of results, and the README's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.figures import GOALS, Goal, Results, withstood
from benchmarks.report import BEGIN, END, as_html, embedded, goal_table, headline_table, page, with_table
from pipeline.system.errors import InputError
from tests import ROOT

RESULTS = ROOT / "benchmarks" / "results"
REMEDY = "run python -m benchmarks.report --readme README.md"


def write(folder: Path, name: str, result: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for date, processor, rate in (("2026-01-01", "Old", 3.0), ("2026-02-01", "New", 2.0)):
        about = {"machine": {"processor": processor, "gpu": None}, "rate": rate}
        write(tmp_path, f"{date}-speed.json", about)
    (tmp_path / "2026-02-01-speed.md").write_text(
        "# Speed\n\nNew.\n\n    python -m speed\n\n| | x |\n|---|--:|\n| a | 2 |\n"
    )
    (tmp_path / "notes.txt").write_text("not a result")
    return tmp_path


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


def test_the_page_shows_the_newest_result_and_links_the_others(folder: Path) -> None:
    results = Results(folder)
    assert results.series() == ["speed"]
    markdown = page(results, embedded)
    assert "## Speed\n\nNew.\n\n    python -m speed\n\n| | x |" in markdown
    assert "Earlier: [2026-01-01-speed.json](2026-01-01-speed.json)." in markdown
    html = as_html(markdown)
    assert "<td" in html
    assert "<h2>Speed</h2>" in html
    assert "http" not in html.replace("https://", "")


def test_most_goals_are_measured() -> None:
    verdicts = [goal.judge(Results(RESULTS)) for goal in GOALS]
    assert sum(verdict != "not measured" for _, verdict in verdicts) >= 10


def test_the_readme_table_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme, headline_table(Results(RESULTS))) == readme, REMEDY


def test_the_page_is_up_to_date() -> None:
    def named(name: str, content: bytes) -> str:
        return name if (RESULTS / name).exists() else f"pictures/{name}"

    assert (RESULTS / "report.md").read_text() == page(Results(RESULTS), named), REMEDY


def test_a_readme_without_marks_is_rejected() -> None:
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(InputError, match="the README has no"):
        with_table("nothing", "new")


def test_tests_without_a_fault_are_not_counted() -> None:
    rows = [("kill", "ends alike", "as expected"), ("no space", "loud", "failed: x"), ("(a test)", "", "failed: y")]
    faults = [dict(zip(("fault", "expected", "verdict"), row, strict=True)) for row in rows]
    assert withstood({"faults": faults}) == (1, 2)
