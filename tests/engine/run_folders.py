"""Run folders like those of training, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import storage
from engine.config.settings import Data, Model, Settings
from methods.encoders import resnet
from tests.engine.small import settings as small

STEPS = 10  # an epoch
EPOCHS = 4


def settings(data: Path | str = "", **more: Any) -> Settings:
    """Return settings of a small run of four epochs."""
    name = more.pop("method", "moco_v2")
    chosen = small(name)
    chosen.data = Data(train=str(data), size=32, batch=20, eval_crop_ratio=1.0)
    chosen.model = Model("resnet18", "small", 0.125, 16)
    chosen.optim.epochs = EPOCHS
    for key, value in more.items():
        setattr(chosen, key, value)
    return chosen


def lines(epochs: float = EPOCHS, shift: float = 0.0) -> list[dict[str, float]]:
    """Return metrics of that many epochs, two lines each, with kNN after each; all values shifted by `shift`."""
    metrics: list[dict[str, float]] = []
    for half in range(1, round(2 * epochs) + 1):
        epoch = half / 2
        line = {"step": half * STEPS // 2, "epoch": epoch, "loss": 5.0 - epoch + shift, "info_nce": 5.0 - epoch + shift}
        line |= {"student_teacher_gap": 0.5 / epoch + shift, "alignment": 1 / epoch, "uniformity": -epoch}
        line |= {"embedding_std": 0.9, "effective_rank": 10 + epoch, "lr": 0.1 / epoch, "momentum": 0.99}
        metrics.append(line | {"pairs_per_second": 100.0 * half, "data_wait_fraction": 0.01 * half})
        if half % 2 == 0:
            metrics.append({"step": half * STEPS // 2, "epoch": epoch, "knn_top1": 0.1 * epoch + shift})
    return metrics


def write_lines(folder: Path, metrics: Sequence[dict[str, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def write_run(folder: Path, chosen: Settings | None = None, epochs: float = EPOCHS, shift: float = 0.0) -> Path:
    """Write a run without a checkpoint, trained for so many of its epochs; return the folder."""
    chosen = chosen or settings()
    write_lines(folder, lines(epochs, shift))
    chosen.out = str(folder)
    chosen.write(folder / "config.yaml")
    if epochs >= chosen.optim.epochs:
        (folder / "summary.json").write_text(json.dumps({"device": "cpu", "processes": 1, "training_seconds": 1.0}))
    return folder


def write_checkpoint(folder: Path, chosen: Settings, step: int = EPOCHS * STEPS, seed: int = 0) -> Path:
    """Write a checkpoint of a random encoder into a run's folder; return it."""
    torch.manual_seed(seed)
    state = resnet("resnet18", stem="small", width=0.125).state_dict()
    tensors = {
        f"{which}.backbone.{name}": value.clone() for which in ("online", "target") for name, value in state.items()
    }
    rest = {"loader": {}, "monitor": {}, "settings": chosen.as_dict()}
    return storage.write(folder / "checkpoints", step, {"model": tensors}, rest)


def write_evaluation(folder: Path, name: str, title: str, top1: float, **more: Any) -> None:
    """Write the result of an evaluation."""
    document = {"evaluation": title, "checkpoint": f"x/step_{EPOCHS * STEPS:08d}", "which": "online", "top1": top1}
    document |= {"train": "a/train.beton", "test": "a/test.beton", "interval": [top1 - 0.01, top1 + 0.01]}
    document["settings"] = {"encoder": folder.name, "train": "f1", "test": "f2", "seed": 0}
    document |= more
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / f"{name}.json").write_text(json.dumps(document))
