"""The page of results, and the README's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common.figures import Results
from benchmarks.report import BEGIN, END, as_html, embedded, headline_tables, page, with_tables
from pipeline.system.errors import InputError
from tests import ROOT

RESULTS = ROOT / "benchmarks" / "results"
REMEDY = "run python -m benchmarks.report --readme README.md"


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


def test_the_readme_table_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_tables(readme, headline_tables(Results(RESULTS))) == readme, REMEDY


def test_the_page_is_up_to_date() -> None:
    def named(name: str, content: bytes) -> str:
        return name if (RESULTS / name).exists() else f"pictures/{name}"

    assert (RESULTS / "report.md").read_text() == page(Results(RESULTS), named), REMEDY


def test_a_readme_without_marks_is_rejected() -> None:
    assert with_tables(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(InputError, match="the README has no"):
        with_tables("nothing", "new")
