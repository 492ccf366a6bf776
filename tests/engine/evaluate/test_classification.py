"""Data of evaluations on betons."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.settings import Data
from engine.evaluate.classification import ClassificationEvaluation, top5
from engine.weights.load import load_encoder
from pipeline.system.errors import InputError
from tests.engine.evaluate.conftest import evaluate
from tests.engine.run_folders import settings, write_checkpoint


@pytest.mark.parametrize(
    ("data", "given", "ratio"),
    [
        ({}, None, 0.875),
        ({"eval_crop_ratio": 0.9}, None, 0.9),
        ({"eval_crop_ratio": 0.9}, 0.5, 0.5),
    ],
)
def test_the_crop_ratio_is_the_runs_unless_given(
    data: dict[str, float], given: float | None, ratio: float, tmp_path: Path
) -> None:
    chosen = settings("train.beton")
    chosen.data = Data(size=32, batch=20, **data)
    write_checkpoint(tmp_path, chosen)
    evaluation: Any = SimpleNamespace(args=SimpleNamespace(crop_ratio=given), encoder=load_encoder(tmp_path))
    assert ClassificationEvaluation.crop_ratio.fget(evaluation) == ratio  # type: ignore[attr-defined]


def test_fewer_than_five_classes_are_padded() -> None:
    assert top5(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).tolist() == [[1, 0, -1, -1, -1], [0, 1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crop-ratio", "1.5"], r"--crop-ratio 1.5: choose a ratio above 0, up to 1"),
        (["--size", "4"], "--size 4: choose 8 to 1024 pixels"),
        (["--batch", "0"], "--batch 0: choose 1 or more"),
    ],
)
def test_impossible_options_are_refused(options: list[str], message: str, encoder: Path, drawn: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate("knn", encoder, drawn, *options)
