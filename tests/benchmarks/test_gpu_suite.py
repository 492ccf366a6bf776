"""The GPU suite runs every part, whatever the outcome of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Part
from tests.benchmarks.conftest import Run


@pytest.mark.slow
def test_failed_and_missing_parts_are_reported_and_the_others_run(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    crops = gpu_suite.parts(drawn, drawn, [1])[2]
    failing = Part("failing", "benchmarks.crops", ["--data", "/nowhere"], [], crops.report)
    lacking = Part("lacking", "benchmarks.crops", [], [], crops.report, ("no_such_package.inside",))
    monkeypatch.setattr(gpu_suite, "parts", lambda *_: [failing, lacking, crops])
    assert run(gpu_suite, "--out", str(tmp_path / "out"), "--dry-run", "--data", str(drawn)) == 0
    report = (tmp_path / "out" / "suite.md").read_text()
    sections = {section.split("\n")[0]: section for section in report.split("## ")[1:]}
    assert "failed with status" in sections["failing"]
    assert "/nowhere" in sections["failing"]
    assert "left out: no_such_package.inside cannot be imported" in sections["lacking"]
    assert "views/s" in sections["crops"]
    result = json.loads((tmp_path / "out" / "suite.json").read_text())["crops"]
    assert f"{result['views_per_second']:.0f} views/s" in report


def test_a_part_is_cut_off_when_time_is_over(tmp_path: Path) -> None:
    slow = Part("slow", "timeit", ["-n", "1", "print('begun', flush=True); import time; time.sleep(600)"], [], None)
    text, result = gpu_suite.run(slow, tmp_path, False, 1.0)
    assert text.startswith("cut off after 1 s: begun: see failures.txt; took 1 s")
    assert result is None
    assert gpu_suite.run(slow, tmp_path, False, 0.0) == ("left out: no time was left", None)
    gpu_suite.run(slow, tmp_path, False, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["failures.txt"]
    assert (tmp_path / "failures.txt").read_text() == "==== slow ====\nbegun\n\n" * 2


def test_the_fewest_threads_that_reach_the_pace_are_named() -> None:
    def rate(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value}

    rows: list[dict[str, Any]] = [{"name": "ffcv", "threads": n, "wall": rate(1500.0 * n)} for n in (1, 2, 4, 8)]
    rows += [{"name": "dali", "threads": 1, "wall": rate(4999.0)}]
    rest = {"note": "", "ratio": None, "read_bytes": 0, "to_device_bytes": 0, "first_batch_seconds": 0, "peak_bytes": 0}
    paths = [{**row, **rest, "cpu": row["wall"]} for row in rows]
    report = gpu_suite._loader({"data": "x", "images": 1, "settings": {}, "paths": dict(enumerate(paths))})
    assert "ffcv reaches 5000 pairs/s with 4 threads" in report.notes
    assert "dali reaches 5000 pairs/s with none of these numbers of threads" in report.notes
    assert len(report.rows) == 5


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(tmp_path: Path, run: Run) -> None:
    assert run(gpu_suite, "--out", str(tmp_path / "out"), "--dry-run", "--threads", "1") == 0
    report = (tmp_path / "out" / "suite.md").read_text()
    assert "failed" not in report
    assert "cut off" not in report
    assert not list((tmp_path / "out").glob("*.beton*"))
    assert len(list((tmp_path / "out").iterdir())) <= 8
