"""Parts of every evaluation: the frozen backbone, the folder of results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.evaluation import _default_folder
from pipeline.system.errors import InputError, RunFailed
from tests.engine.evaluate.conftest import evaluate


def test_a_backbone_that_changes_is_detected(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = ClassificationEvaluation.embed

    def training_mode(self: ClassificationEvaluation, images: torch.Tensor) -> torch.Tensor:
        self.backbone.train()  # the usual mistake: running statistics move
        return embed(self, images)

    monkeypatch.setattr(ClassificationEvaluation, "embed", training_mode)
    with pytest.raises(RunFailed, match="backbone changed"):
        evaluate("linear", encoder, drawn, "--epochs", "1", "--batch", "32")


def test_results_go_to_the_run_or_next_to_the_file(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    for path in (tmp_path / "run", checkpoint):
        assert _default_folder(path) == tmp_path / "run" / "evaluation"
    assert _default_folder(tmp_path / "x.pth") == tmp_path / "x.pth.evaluation"


def test_a_folder_that_cannot_be_created_is_refused(encoder: Path, drawn: Path) -> None:
    with pytest.raises(InputError, match=r"--out .*encoder.pth/x: cannot be created"):
        evaluate("knn", encoder, drawn, "--out", str(encoder / "x"))
