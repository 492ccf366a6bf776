"""Numbers of runs against their files, groups of seeds, and differing settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.report.compare import differences, group_by_settings, rates, table
from engine.report.run_folder import RunFiles, read_runs
from methods.registry import Terms
from methods.residual import Residual
from tests.engine.run_folders import EPOCHS, lines, settings, write_evaluation, write_run


def column(runs: list[RunFiles], title: str) -> dict[str, str]:
    """Return a column of the table by row, with a star after the best."""
    titles, rows = table(group_by_settings(runs))
    cells = {row.name: row.cells[titles.index(title)] for row in rows}
    return {name: cell.text + " *" * cell.best for name, cell in cells.items()}


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_evaluation(run, "knn", "kNN, k 200, T 0.07", 0.5123)
    write_evaluation(run, "svm", "linear SVMs", 0.0, map=0.611)
    runs = read_runs([run])
    titles, rows = table(group_by_settings(runs))
    cells = dict(zip(titles, rows[0].cells, strict=True))
    last = lines()[-2]
    assert cells["method"].text == "moco_v2"
    assert cells["loss"].text == f"{last['loss']:.3f}"
    assert cells["gap"].text == f"{last['student_teacher_gap']:.4f}"
    assert cells["kNN top-1, %"].text == "40.0"
    assert cells["kNN, k 200, T 0.07: top-1, %"] == ("51.2", "50.2–52.2", False)
    assert cells["linear SVMs: mAP, %"].text == "61.1"
    assert (cells["epochs"].text, cells["batch"].text, cells["device"].text) == ("4", "20", "cpu")


def test_rates_are_over_the_entire_training(tmp_path: Path) -> None:
    seconds = [20 * 5 / (100 * half) for half in range(1, 9)]
    waited = sum(second * 0.01 * half for half, second in enumerate(seconds, start=1))
    computed = rates(read_runs([write_run(tmp_path / "a")])[0])
    assert computed.pairs_per_second == pytest.approx(40 * 20 / sum(seconds))
    assert computed.hours == pytest.approx(sum(seconds) / 3600)
    assert computed.data_wait_fraction == pytest.approx(waited / sum(seconds))


def test_seeds_are_summarized_and_the_best_mean_is_marked(tmp_path: Path) -> None:
    shifts = (0.0, 0.05, 0.02)
    seeds = [write_run(tmp_path / f"s{i}", settings(seed=i), shift=shift) for i, shift in enumerate(shifts)]
    other = write_run(tmp_path / "other", settings(method="simclr"), shift=0.04)
    unfinished = write_run(tmp_path / "more", settings(seed=7), epochs=2, shift=0.3)
    long = settings(method="byol")
    long.optim.epochs = 2 * EPOCHS
    runs = read_runs([*seeds, unfinished, other, write_run(tmp_path / "half", long, shift=0.04)])
    knn = 100 * (0.4 + np.array(shifts))
    mean = f"{knn.mean():.1f} ± {knn.std(ddof=1):.1f}"
    assert column(runs, "kNN top-1, %") == {
        "s0": "40.0", "s1": "45.0", "s2": "42.0", "more": "50.0",
        "mean ± deviation, n = 3": mean, "other": "44.0 *", "half": "44.0",
    }  # fmt: skip
    assert not any(cell.endswith("*") for cell in column(runs, "loss").values())  # of two methods
    assert not any(cell.endswith("*") for cell in column(runs, "minutes").values())
    assert column(runs[:3], "loss") == {
        "s0": "1.000", "s1": "1.050", "s2": "1.020", "mean ± deviation, n = 3": "1.023 ± 0.025"
    }  # fmt: skip


def test_scores_of_other_data_or_protocols_have_their_own_columns(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, settings(method=name)) for name in ("moco_v2", "byol")]
    write_evaluation(runs[0], "knn", "kNN", 0.5)
    write_evaluation(runs[1], "knn", "kNN", 0.6, settings={"encoder": "z", "train": "f1", "test": "f9", "seed": 3})
    for run, lr in zip(runs, (0.3, 3.0), strict=True):  # found by a sweep
        write_evaluation(run, "fast", "linear", 0.7, sweep=[], settings={"lr": lr, "test": "f2"})
    write_evaluation(runs[0], "momentum", "linear", 0.6, settings={"test": "f2"}, which="momentum")
    titles, _ = table(group_by_settings(read_runs(runs)))
    assert [title for title in titles if title.startswith(("kNN:", "linear"))] == [
        "kNN: top-1, %, test test.beton (f2)",
        "kNN: top-1, %, test test.beton (f9)",
        "linear, momentum encoder: top-1, %",
        "linear: top-1, %",
    ]


def test_runs_of_a_group_differ_by_seed_alone(tmp_path: Path) -> None:
    chosen = [settings(seed=0), settings(seed=1, log_every=7), settings(seed=2, terms=Terms(residual=Residual()))]
    chosen[2].optim.lr = 0.5
    runs = read_runs([write_run(tmp_path / str(i), one) for i, one in enumerate(chosen)])
    assert [[run.name for run in group.runs] for group in group_by_settings(runs)] == [["0", "1"], ["2"]]
    assert dict(differences(runs)) == {
        "seed": ["0", "1", "2"],
        "terms.residual.weight": ["–", "–", "1.0"],
        "log_every": ["50", "7", "50"],
        "optim.lr": ["0.1", "0.1", "0.5"],
    }
