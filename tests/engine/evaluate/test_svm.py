"""Linear SVMs against scikit-learn's, class by class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.nn import functional as F

from engine.evaluate import svm
from engine.evaluate.__main__ import run
from pipeline.beton import Beton
from tests.engine.evaluate.conftest import evaluate


def _voc(folder: Path, beton: Beton, test: bool) -> Path:
    """Write ImageSets/Main of a beton. Each image is of its class, and of a second one if its number is odd."""
    folder.mkdir()
    part = [index for index in range(len(beton)) if (index % 3 == 1) == test]
    for label, name in [*enumerate(beton.classes), (-1, "odd")]:
        lines = []
        for index in part:
            positive = index % 2 if label < 0 else beton.labels[index] == label
            difficult = index % 17 == 0
            lines.append(f"{Path(beton.name(index)).stem} {0 if difficult else 1 if positive else -1:2d}")
        (folder / f"{name}_{'test' if test else 'trainval'}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_scores_equal_scikit_learns(encoder: Path, drawn: Path, tmp_path: Path) -> None:
    machines, metrics = pytest.importorskip("sklearn.svm"), pytest.importorskip("sklearn.metrics")
    train, test = (_voc(tmp_path / str(side), Beton(drawn), side) for side in (False, True))
    result = evaluate("svm", encoder, drawn, "--sets", str(train), "--test-sets", str(test), "--costs", "1")
    file = tmp_path / "f.safetensors"
    options = ["--train", str(drawn), "--size", "16", "--cpu", "--precision", "no", "--workers", "1"]
    run(["features", str(encoder), *options, "--out", str(file)])
    x = F.normalize(load_file(file)["features"], dim=1).numpy()
    beton = Beton(drawn)
    names, labels, rows = svm.read_multi_labels(train, "trainval", beton)
    _, true, queries = svm.read_multi_labels(test, "test", beton)
    assert sorted(names) == sorted([*beton.classes, "odd"])
    precisions = []
    for column in range(len(names)):
        known, asked = labels[:, column] != 0, true[:, column] != 0
        machine = machines.LinearSVC(C=1.0, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0)
        machine.fit(x[rows[known]], labels[known, column])
        decision = machine.decision_function(x[queries[asked]])
        precisions.append(metrics.average_precision_score(true[asked, column] == 1, decision))
    assert result["map"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert result["interval"][0] < result["map"] < result["interval"][1]
    assert set(result["costs"].values()) == {1.0}
