"""Choice of charts, and thinning of long curves."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.report import curves, page
from engine.report.compare import group_by_settings
from engine.report.run_folder import Curve, read_runs
from tests.engine.run_folders import lines, settings, write_lines, write_run


def test_long_curves_are_drawn_as_means_over_equal_spans() -> None:
    epochs = np.arange(1, 1001) / 10
    values = np.random.default_rng(0).random(1000)
    (thin,) = curves.thin([Curve(epochs, values)], 20)
    assert thin.epochs == pytest.approx(np.arange(20) * 5 + 2.5)
    assert thin.values == pytest.approx(values.reshape(20, 50).mean(axis=1))
    assert curves.thin([Curve(epochs, values)], 500)[0].values is values


def test_charts_are_selected_by_the_data(tmp_path: Path) -> None:
    plain, more = write_run(tmp_path / "a"), write_run(tmp_path / "b", settings(seed=1))
    write_lines(more, [line | {"co2": 0.5, "info_nce": 1.0, "skipped": 2, "substituted": 0} for line in lines()])
    keys = [chart.key for chart in curves.select_charts(read_runs([plain]))]
    assert keys[:3] == ["loss", "knn_top1", "student_teacher_gap"]  # info_nce is all of the loss
    runs = read_runs([plain, more])
    both = curves.select_charts(runs)
    assert {"co2", "info_nce", "skipped"} <= {chart.key for chart in both}
    assert "substituted" not in {chart.key for chart in both}
    texts = {chart.key: curves.last_values(chart, group_by_settings(runs)) for chart in both}
    assert texts["skipped"] == f"skipped steps; last values: b {2 * len(lines())}"
    assert texts["alignment"] == "alignment over uniformity; last values: a -4 by 0.25; b -4 by 0.25"


@pytest.mark.usefixtures("rendered")
def test_all_charts_of_a_run_are_one_picture(tmp_path: Path) -> None:
    sizes = []
    for keys in ({"loss"}, {"loss", "lr"}):
        run = write_run(tmp_path / f"{len(keys)}")
        write_lines(run, [{key: line[key] for key in line if key in keys | {"step", "epoch"}} for line in lines()])
        sizes.append(Image.open(io.BytesIO(curves.draw_all([run]))).size)
    assert sizes[1][0] == pytest.approx(2 * sizes[0][0], rel=0.01)


@pytest.mark.usefixtures("rendered")
def test_huge_numbers_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    keys = ("step", "epoch", "loss", "alignment", "uniformity", "skipped")
    wild = [{key: value * 1e308 for key, value in zip(keys, (1, 1, -1, 1, -1, 1), strict=True)}]
    write_lines(run, [{key: line[key] for key in keys if key in line} for line in lines()] + wild)
    assert "curves" in page.report(read_runs([run]), None).pictures
