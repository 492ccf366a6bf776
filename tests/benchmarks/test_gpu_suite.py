"""The GPU suite runs every part, whatever the outcome of the others, and says how to continue."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import crops, gpu_suite
from benchmarks.gpu_suite import Call, Part
from tests.benchmarks.conftest import Run

LACKING = Call("lacking", "benchmarks.crops", [], [], crops.report, ("no_such_package.inside",))


def of_parts(monkeypatch: pytest.MonkeyPatch, *parts: Part) -> None:
    monkeypatch.setattr(gpu_suite, "parts", lambda *_: list(parts))


@pytest.fixture
def arguments(drawn: Path, tmp_path: Path) -> list[str]:
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    return [*folders, "--data", str(drawn), "--cifar", str(drawn), "--dry-run"]


@pytest.mark.slow
def test_failed_and_missing_calls_are_reported_and_the_others_run(
    arguments: list[str], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    calls = gpu_suite.parts(drawn, drawn, [1], tmp_path)[4].calls
    kernels = next(call for call in calls if call.name == "kernels")
    failing = Call("failing", "benchmarks.crops", ["--data", "/nowhere"], [], crops.report)
    of_parts(monkeypatch, Part("A", "one", 60, [failing, LACKING]), Part("B", "two", 60, [kernels]))
    assert run(gpu_suite, *arguments) == 0
    report = (tmp_path / "out" / "suite.md").read_text()
    sections = {section.split("\n")[0]: section for section in report.split("### ")[1:]}
    assert "failed with status" in sections["failing"]
    assert "/nowhere" in sections["failing"]
    assert "left out: no_such_package.inside cannot be imported" in sections["lacking"]
    assert "views/s" in sections["kernels"]
    result = json.loads((tmp_path / "out" / "suite.json").read_text())["kernels"]
    assert f"{result['views_per_second']:.0f} views/s" in report
    assert f"augmentation: {next(iter(result['kernels']['augmentation']))}" in report


def test_a_call_is_cut_off_when_time_is_over(tmp_path: Path) -> None:
    slow = Call("slow", "timeit", ["-n", "1", "print('begun', flush=True); import time; time.sleep(600)"], [], None)
    text, result = gpu_suite.run(slow, tmp_path, False, 1.0)
    assert text.startswith("cut off after 1 s: begun: see failures.txt; took 1 s")
    assert result is None
    assert gpu_suite.run(slow, tmp_path, False, 0.0) == ("left out: no time was left", None)
    gpu_suite.run(slow, tmp_path, False, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["failures.txt"]
    assert (tmp_path / "failures.txt").read_text() == "==== slow ====\nbegun\n\n" * 2


def test_parts_are_chosen_continue_the_page_and_share_caches(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    of_parts(monkeypatch, *(Part(letter, f"title {letter}", 60, [LACKING]) for letter in "ABC"))
    for chosen, following in ((["B"], "C"), (["C", "A"], None)):
        options = [word for letter in chosen for word in ("--part", letter)]
        assert run(gpu_suite, *arguments, *options) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        if following is None:
            assert last == "next: nothing, these were the last parts"
        else:
            assert last.startswith(f"next: python -m benchmarks.gpu_suite --part {following} --out ")
            assert {*shlex.split(last)} >= {*arguments}
    report = (tmp_path / "out" / "suite.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        f"## {letter}: title {letter}" for letter in "BAC"
    ]
    results = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert {"part A", "part B", "part C"} == set(results)


def test_a_part_without_time_is_the_next_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    of_parts(monkeypatch, Part("A", "a", 60, [LACKING]), Part("B", "b", 60, [LACKING]))
    assert run(gpu_suite, *arguments, "--seconds", "0") == 0
    assert "--part A --out" in capsys.readouterr().out.splitlines()[-1]


def test_compiled_code_is_kept_in_the_cache(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    of_parts(monkeypatch, Part("A", "a", 60, [Call("env", "sysconfig", [], [], None)]))
    seen: dict[str, Any] = {}

    def recorded(call: Call, out: Path, small: bool, seconds: float, environment: dict[str, str]) -> tuple[str, None]:
        seen.update(environment)
        return "ran", None

    monkeypatch.setattr(gpu_suite, "run", recorded)
    assert run(gpu_suite, *arguments) == 0
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        assert Path(seen[name]).parent == tmp_path / "cache"


def test_parts_take_at_most_nine_minutes_and_their_options_exist(drawn: Path, tmp_path: Path) -> None:
    suite = gpu_suite.parts(drawn, drawn, [1], tmp_path)
    assert [part.letter for part in suite] == list("ABCDEFGH")
    assert all(part.seconds <= 540 for part in suite)
    names = [call.name for part in suite for call in part.calls]
    assert len(names) == len(set(names))
    for call in (call for part in suite for call in part.calls if call.module.startswith("benchmarks.")):
        module = getattr(gpu_suite, call.module.split(".")[1])
        known, rest = module.parser().parse_known_args([*call.arguments, *call.small])
        assert known
        if call.module.endswith((".crops", ".loader")):
            assert not rest
        assert call.report is not None


def test_large_images_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "_DRAWN", 2)
    monkeypatch.setattr(gpu_suite, "_COPIES", 3)
    monkeypatch.setattr(gpu_suite, "_SIDES", (64, 48))
    path = gpu_suite._drawn(tmp_path, large=True)
    beton = gpu_suite.Beton(path)
    assert (beton.heights.tolist(), beton.widths.tolist(), len(beton.classes)) == ([48] * 6, [64] * 6, 2)
    stamp = path.stat().st_mtime_ns
    assert gpu_suite._drawn(tmp_path, large=True).stat().st_mtime_ns == stamp
    assert {file.name for file in tmp_path.iterdir()} == {
        "drawn-64.beton",
        "drawn-64.beton.columns",
        "drawn-64.beton.json",
    }


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
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert run(gpu_suite, *folders, "--dry-run", "--threads", "1", "--seconds", "1800") == 0
    report = (tmp_path / "out" / "suite.md").read_text()
    assert "failed" not in report
    assert "cut off" not in report
    assert len(list((tmp_path / "out").iterdir())) <= 8
