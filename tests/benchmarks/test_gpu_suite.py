"""The suite runs its parts one after another, whatever becomes of each, and says what it left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Part


def main(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(out), "--dry-run", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    return int(ended.value.code or 0), (out / "suite.md").read_text()


@pytest.mark.slow
def test_what_fails_or_is_missing_is_said_and_the_rest_runs(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = gpu_suite.parts(drawn, drawn, [1])[2]
    failing = Part("failing", "benchmarks.crops", ["--data", "/nowhere"], [], crops.report)
    lacking = Part("lacking", "benchmarks.crops", [], [], crops.report, ("no_such_package.inside",))
    monkeypatch.setattr(gpu_suite, "parts", lambda *_: [failing, lacking, crops])
    status, report = main(monkeypatch, tmp_path / "out", "--data", str(drawn))
    assert status == 0
    sections = {section.split("\n")[0]: section for section in report.split("## ")[1:]}
    assert "failed with status" in sections["failing"]
    assert "/nowhere" in sections["failing"]
    assert "left out: no_such_package.inside cannot be imported" in sections["lacking"]
    assert "views/s" in sections["crops"]
    result = json.loads((tmp_path / "out" / "suite.json").read_text())["crops"]
    assert f"{result['views_per_second']:.0f} views/s" in report


def test_a_part_has_the_time_that_is_left(tmp_path: Path) -> None:
    slow = Part("slow", "timeit", ["-n", "1", "print('begun', flush=True); import time; time.sleep(600)"], [], None)
    text, result = gpu_suite.run(slow, tmp_path, False, 1.0)
    assert text.startswith("cut off after 1 s: begun: see failures.txt; took 1 s")
    assert result is None
    assert gpu_suite.run(slow, tmp_path, False, 0.0) == ("left out: no time was left", None)
    gpu_suite.run(slow, tmp_path, False, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["failures.txt"]
    assert (tmp_path / "failures.txt").read_text() == "==== slow ====\nbegun\n\n" * 2


def test_numbers_of_threads_that_keep_the_pace_are_named() -> None:
    def rate(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value}

    rows: list[dict[str, Any]] = [{"name": "ffcv", "threads": n, "wall": rate(1500.0 * n)} for n in (1, 2, 4, 8)]
    rows += [{"name": "dali", "threads": 1, "wall": rate(4999.0)}]
    rest = {"note": "", "ratio": None, "read_bytes": 0, "to_device_bytes": 0, "first_batch_seconds": 0, "peak_bytes": 0}
    paths = [{**row, **rest, "cpu": row["wall"]} for row in rows]
    made = gpu_suite._loader({"data": "x", "images": 1, "settings": {}, "paths": dict(enumerate(paths))})
    assert "ffcv reaches 5000 pairs/s with 4 threads" in made.notes
    assert "dali reaches 5000 pairs/s with none of these numbers of threads" in made.notes
    assert len(made.rows) == 5


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, report = main(monkeypatch, tmp_path / "out", "--threads", "1")
    assert status == 0
    assert "failed" not in report
    assert "cut off" not in report
    assert not list((tmp_path / "out").glob("*.beton*"))
    assert len(list((tmp_path / "out").iterdir())) <= 8
