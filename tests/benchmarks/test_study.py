"""Studies: jobs, figures of rows, resuming."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib import pyplot as plt
from scipy import stats

from benchmarks import study
from benchmarks.common import lightly_moco
from benchmarks.study import COLUMNS, Job, figures, gather, load_study, report
from engine.config.cli import parse
from engine.report.run_folder import read_runs
from pipeline.system.errors import InputError
from tests import ROOT
from tests.engine.test_run import SMALL

TINY = dict(zip((key.removeprefix("--") for key in SMALL[::2]), SMALL[1::2], strict=True))


def finished_job(folder: Path, seed: int, knn: list[float], linear: float | None) -> Job:
    """Write the files of a finished run."""
    folder.mkdir()
    settings = {"data": {"batch": 10}, "optim": {"epochs": len(knn)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        {
            "step": 5 * (e + 1),
            "epoch": e + 1,
            "student_teacher_gap": 0.1 / (e + 1),
            "alignment": 1 / (e + 1),
            "uniformity": -e,
            "pairs_per_second": 25.0,
            "knn_top1": v,
        }
        for e, v in enumerate(knn)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text("{}")
    if linear is not None:
        (folder / "evaluation").mkdir()
        result = {"evaluation": "linear, fast", "top1": linear}
        (folder / "evaluation" / "linear_fast.json").write_text(json.dumps(result))
    return Job("a", seed, folder, [], [])


def test_rows_have_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    ends = [(0.3, 0.52), (0.4, 0.5), (0.45, None)]
    jobs = [finished_job(tmp_path / str(i), i, [0.2, 0.25, 0.28, end], linear) for i, (end, linear) in enumerate(ends)]
    (row,) = gather([*jobs, Job("a", 3, tmp_path / "none", [], [])])
    assert row["seeds"] == [0, 1, 2]
    assert row["knn"] == {
        "mean": pytest.approx(np.mean([0.3, 0.4, 0.45])),
        "deviation": pytest.approx(np.std([0.3, 0.4, 0.45], ddof=1)),
    }
    assert row["linear"] == {"mean": pytest.approx(0.51), "deviation": pytest.approx(np.std([0.52, 0.5], ddof=1))}
    assert row["gap_midway"]["mean"] == pytest.approx(0.05)
    assert row["gap"]["mean"] == pytest.approx(0.025)
    assert row["seconds"] == {"mean": pytest.approx(20 * 10 / 25), "deviation": 0.0}
    assert row["rate"]["mean"] == pytest.approx(25.0)
    result = {
        "study": "s",
        "reach": "",
        "rows": [row],
        "at_once": 1,
        "device": "2 cores",
        "problems": {},
        "left_out": ["peer"],
    }
    table = report(result)
    assert table.rows == [
        ["a", "3", "38.3 ± 7.6", "51.0 ± 1.4", "10.3 ± 7.6", "0.0500 ± 0.0000", "0.0250 ± 0.0000"]
        + ["0.250 ± 0.000", "-3.00 ± 0.00", "8 ± 0", "25 ± 0"]
    ]
    assert "not installed, and left out: peer" in table.notes


def test_runs_are_timed_to_the_final_score_of_another(tmp_path: Path) -> None:
    curves = [[0.2, 0.3, 0.3], [0.1, 0.2, 0.3]]
    jobs = [finished_job(tmp_path / str(i), i, curve, None) for i, curve in enumerate(curves)]
    peers = [finished_job(tmp_path / f"p{i}", i, [0.1, end], None) for i, end in enumerate((0.2, 0.3))]
    jobs += [replace(job, name="peer") for job in peers]
    rows = {row["name"]: row for row in gather(jobs, "peer")}
    assert [seed["reached"] for seed in rows["a"]["every"]] == [pytest.approx(4.0), pytest.approx(6.0)]  # s, to 0.25
    assert [seed["reached"] for seed in rows["peer"]["every"]] == [None, pytest.approx(4.0)]
    result = {"study": "s", "reach": "peer", "at_once": 1, "device": "2 cores", "problems": {}, "left_out": []}
    table = report(result | {"rows": list(rows.values())})
    assert table.headings[-1] == "s to peer"
    assert [row[-1] for row in table.rows] == ["5.0 ± 1.4", "4.0 (1 of 2 seeds)"]
    assert [row["reached"]["mean"] for row in gather(jobs)] == [None, None]


ENDS = {"base": (0.40, 0.41, 0.45), "lower": (0.37, 0.39, 0.42), "same": (0.42, 0.40, 0.45), "one": (0.5,)}
"""Final kNN top-1 of each run's seeds."""


def compared_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of finished runs of ten epochs, compared with the first."""
    jobs = [
        replace(finished_job(folder / f"{name}-{seed}", seed, [0.1] * 7 + [0.36, 0.38, end], None), name=name)
        for name, ends in ENDS.items()
        for seed, end in enumerate(ends)
    ]
    return gather(jobs, bases={name: "base" for name in ENDS if name != "base"} | {"gone": "base", "base": "gone"})


def test_differences_from_the_base_are_paired_by_seed(tmp_path: Path) -> None:
    base, lower, same, one = compared_rows(tmp_path)
    assert "differences" not in base
    for row, name in ((lower, "lower"), (same, "same")):
        low, high = stats.ttest_rel(ENDS[name], ENDS["base"]).confidence_interval(0.95)
        difference = row["differences"]["knn"]
        assert difference["mean"] == pytest.approx(np.mean(ENDS[name]) - np.mean(ENDS["base"]))
        assert (difference["low"], difference["high"]) == pytest.approx((low, high), rel=1e-4)
        assert difference["pairs"] == 3
        assert "linear" not in row["differences"]
    assert one["differences"]["knn"] == {"mean": pytest.approx(0.1), "low": None, "high": None, "pairs": 1}


def test_conclusions_are_those_that_the_intervals_carry(tmp_path: Path) -> None:
    rows = compared_rows(tmp_path)
    result = {"study": "s", "reach": "", "at_once": 1, "device": "2 cores", "problems": {}, "left_out": []}
    table = report(result | {"rows": rows})
    assert table.headings[:4] == ["", "seeds", "kNN top-1, %", "difference"]
    assert [row[3] for row in table.rows] == ["", "-2.67 (-4.10 to -1.23)", "+0.33 (-3.46 to +4.13)", "+10.00"]
    assert "lower lowers kNN top-1 by 1.23 to 4.10 points against base" in table.notes
    interval = "(-3.46 to +4.13 points)"
    assert f"same: no difference in kNN top-1 from base that 3 seeds can show {interval}" in table.notes
    assert "one has one seed in common with base: no interval" in table.notes
    assert not [note for note in table.notes if "in alignment" in note or "alignment by" in note]
    rising = [note for note in table.notes if note.startswith("kNN top-1 rose by a point or more in the last fifth")]
    assert [note.rpartition(": ")[2] for note in rising] == ["base, lower, same, one"]


def test_figures_of_the_last_fifth_leave_out_the_epochs_before(tmp_path: Path) -> None:
    finished_job(tmp_path / "a", 0, [0.1] * 7 + [0.36, 0.38, 0.41], None)
    values = figures(read_runs([tmp_path / "a"])[0])
    assert values["gain"] == pytest.approx(0.41 - 0.36)
    assert values["alignment"] == pytest.approx((1 / 9 + 1 / 10) / 2)
    assert values["uniformity"] == pytest.approx(-8.5)


def test_differences_are_drawn_beside_curves_and_scores(tmp_path: Path) -> None:
    study.draw(compared_rows(tmp_path), tmp_path / "three.png")
    assert plt.imread(tmp_path / "three.png").shape[1] == pytest.approx(3 * 5.4 * 160, abs=2)  # inches, dots an inch


def test_an_empty_run_has_no_figures(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (run,) = read_runs([tmp_path])
    assert figures(run) == dict.fromkeys(COLUMNS)


def test_a_peers_folder_has_its_training_time(tmp_path: Path) -> None:
    """Two epochs of four steps of 64 pairs, at 32 and 16 pairs a second."""
    args = argparse.Namespace(out=tmp_path / "peer", width=0.25, batch=64, bank=128, epochs=2, seed=1)
    args.train, args.test = "train.beton", "test.beton"
    lightly_moco.begin(args)
    lines = [{"step": 4 * e, "epoch": e, "pairs_per_second": 64 / e / 2, "knn_top1": 0.1 * e} for e in (1, 2)]
    (args.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (args.out / "summary.json").write_text("{}")
    (row,) = gather([Job("peer", 1, args.out, [], [])], "peer")
    assert row["seconds"]["mean"] == pytest.approx(8 + 16)
    assert row["rate"]["mean"] == pytest.approx(2 * 256 / 24)
    assert row["reached"]["mean"] == pytest.approx(24)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_name_existing_recipes_and_settings(path: Path) -> None:
    loaded = load_study(path.stem)
    for run in loaded.runs.values():
        settings = {**loaded.settings, **run.get("settings", {})}
        overrides = [part for key, value in settings.items() for part in (f"--{key}", study._as_argument(value))]
        parse(["--config", str(ROOT / "engine" / "recipes" / f"{run['recipe']}.yaml"), *overrides])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]", "not a study"),
        ("runs: {a: {recipe: nothing}}", "run 'a': give a recipe"),
        ("runs: {a: {recipe: moco_v2_cifar10, more: 1}}", "run 'a': give a recipe"),
        ("runs: {a: {recipe: moco_v2_cifar10}}\nother: 1", "not a study .*'other'"),
        ("runs: {a: {recipe: moco_v2_cifar10, base: b}}", "run 'a', base 'b': name another run"),
        ("runs: {a: {recipe: moco_v2_cifar10, base: a}}", "run 'a', base 'a': name another run"),
        ("runs: {a: {recipe: moco_v2_cifar10}}\nreach: b", r"not a study \(no runs, or reach is none of them\)"),
    ],
)
def test_a_wrong_study_is_rejected(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_study(str(tmp_path / "s.yaml"))
    with pytest.raises(InputError, match=r"no such study: choose one of .*cifar10-cpu"):
        load_study("nothing")


def test_a_stopped_run_is_not_evaluated(tmp_path: Path) -> None:
    """Training that was stopped exits with status 0 and leaves no summary."""
    evaluated = tmp_path / "evaluated"
    args = argparse.Namespace(out=tmp_path, at_once=1, launch=sys.executable)
    job = Job("a", 0, tmp_path / "a-0", ["true"], ["touch", str(evaluated)])
    assert study.run_jobs([job], args) == {"a, seed 0": "training was stopped before its end"}
    assert not evaluated.exists()
    ended = ["sh", "-c", f"mkdir {job.folder} && touch {job.folder / 'summary.json'}"]
    assert study.run_jobs([replace(job, train=ended)], args) == {}
    assert evaluated.exists()


def test_cpu_seconds_are_those_of_all_processes_of_a_run(tmp_path: Path) -> None:
    """Unknown once a process was killed uncounted."""
    args = argparse.Namespace(out=tmp_path, at_once=1, launch=sys.executable)
    burn = "import os, sys; os.makedirs(sys.argv[1], exist_ok=True)\n"
    burn += "assert os.listdir(sys.argv[1]) == []\nwhile sum(os.times()[:2]) < 0.1: pass"
    job = Job("a", 0, tmp_path / "a-0", [sys.executable, "-S", "-c", burn, str(tmp_path / "a-0")], [])
    assert study.run_jobs([job], args) == {}
    first = study._cpu_seconds(job.folder)
    assert study.run_jobs([job], args) == {}
    both = study._cpu_seconds(job.folder)
    assert first is not None
    assert both is not None
    assert first >= 0.1
    assert both >= first + 0.1
    (job.folder / "cpu_seconds.json").unlink()
    study.run_jobs([job], args)
    assert study._cpu_seconds(job.folder) is None


def test_a_launcher_starts_runs_and_evaluations(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, at_once=1, launch="accelerate launch", only=None, seeds="3")
    args.train, args.test = "train.beton", "test.beton"
    described = study.Study({"a": {"recipe": "moco_v2_cifar10"}}, linear=["--passes", 0])
    (job,) = study.jobs_of(described, args, [])
    for call in (job.train, job.evaluate):
        assert call[:2] == ["accelerate", "launch"]
    assert job.train[job.train.index("--data.workers") + 1] == "0"
    assert job.evaluate[job.evaluate.index("--workers") + 1] == "0"
    assert job.evaluate[-2:] == ["--passes", "0"]


@pytest.mark.slow
def test_a_study_trains_evaluates_and_resumes(drawn: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {**TINY, "optim.epochs": 1, "optim.warmup_epochs": 0, "precision": "no"}
    runs = {
        "moco": {"recipe": "moco_v2_cifar10"},
        "wrong": {"recipe": "moco_v2_cifar10", "settings": {"data.batch": 3000}},
    }
    peers = {"a peer": {"module": "no_such_package", "batch": 64}}
    described = {"runs": runs, "settings": shared, "linear": ["--protocol", "fast", "--passes", 0], "peers": peers}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(described))
    command = [sys.executable, "-m", "benchmarks.study", str(tmp_path / "tiny.yaml"), "--train", str(drawn)]
    command += ["--test", str(drawn), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]
    command += ["--png", str(tmp_path / "result.png"), "--markdown", str(tmp_path / "result.md")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr
    assert "moco, seed 0: training done" in first.stderr
    assert "moco, seed 0: evaluation done" in first.stderr
    assert "a batch of 3000 from 200 samples" in first.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    moco, wrong = result["rows"]
    summary = json.loads((tmp_path / "out" / "moco-0" / "summary.json").read_text())
    assert moco["every"][0]["knn"] == summary["knn_top1"]
    assert 0 <= moco["every"][0]["linear"] <= 1
    assert wrong["seeds"] == []
    assert result["left_out"] == ["a peer"]
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "| moco | 1 |" in (tmp_path / "result.md").read_text()
    again = subprocess.run([*command, "--only", "moco"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stderr
