"""A small encoder, and evaluations of it on drawn images, which may be interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.evaluate import resume
from engine.evaluate.__main__ import run
from methods.encoders import resnet

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small random encoder, as a state dict."""
    torch.manual_seed(0)
    torch.save(resnet("resnet18", stem="small", width=0.25).state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def evaluate(command: str, encoder: Path, drawn: Path, *more: str) -> dict[str, Any]:
    """Run a command on the drawn images at 16 pixels; return the result that it wrote."""
    out = encoder.parent / "out"
    common = ["--train", str(drawn), "--size", "16", "--cpu", "--precision", "no", "--out", str(out), "--workers", "1"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*.json")}
    run([command, str(encoder), *common, *more])
    new = [path for path in out.glob("[!.]*.json") if before.get(path) != path.stat().st_mtime_ns]
    return json.loads(new[0].read_text()) if new else {}


def copy_of(encoder: Path) -> Path:
    """Return a copy of an encoder in another folder, without results."""
    folder = encoder.parent / "other"
    folder.mkdir()
    return Path(shutil.copy(encoder, folder))


def interrupt_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Interrupt the next training after its first save; return the list of the epochs saved."""
    saves: list[int] = []
    save = resume.EpochCheckpoint.save

    def interrupted(self: resume.EpochCheckpoint, epoch: int) -> None:
        save(self, epoch)
        saves.append(epoch)
        if saves == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.EpochCheckpoint, "save", interrupted)
    return saves


def problem() -> Problem:
    """Features of five overlapping classes, each feature of another scale: 3000 for training, 3000 for testing."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, 6000)
    x = (random.normal(size=(5, 24))[labels] + 1.6 * random.normal(size=(6000, 24))) * random.uniform(0.1, 5, 24)
    features, known = torch.from_numpy(x).float(), torch.from_numpy(labels)
    return features[:3000], known[:3000], features[3000:], known[3000:]


def logistic_regression(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, true: torch.Tensor) -> float:
    """Return the accuracy of scikit-learn's logistic regression."""
    models = pytest.importorskip("sklearn.linear_model")
    scale = train.std(dim=0).clamp(min=1e-6)
    model = models.LogisticRegression(max_iter=2000, C=1.0).fit((train / scale).numpy(), labels.numpy())
    return float(model.score((test / scale).numpy(), true.numpy()))
