"""Pretraining from Python: the same run, with callbacks, several in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engine
from engine import Callback, Knn, Settings, load_encoder, pretrain
from engine.parallel import accelerator
from tests.engine.training import runs


class Recorder(Callback):
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.lines.append({"step": step, **metrics})

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        assert "knn_top1" in metrics
        self.lines.append({"step": step, **metrics})


def _settings(drawn: Path, out: Path) -> Settings:
    chosen = runs.settings(drawn, "plain")
    data = replace(chosen.data, eval=str(drawn))
    return replace(chosen, data=data, knn=Knn(k=5), out=str(out), log_every=2)


def test_callbacks_receive_the_lines_of_the_metrics(drawn: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    summary = pretrain(_settings(drawn, tmp_path / "run"), [Callback(), recorder])
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert recorder.lines == written
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["knn_top1"] == written[-1]["knn_top1"]
    encoder = load_encoder(tmp_path / "run")
    assert encoder.preprocess.size == 16
    assert encoder.preprocess.crop_ratio == 0.875
    assert encoder.backbone(torch.zeros(1, 3, 16, 16)).shape == (1, 64)


def test_an_exception_of_a_callback_ends_the_run(drawn: Path, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
            raise ZeroDivisionError(f"at {step}")

    with pytest.raises(ZeroDivisionError, match="at 2"):
        pretrain(_settings(drawn, tmp_path / "run"), [Broken()])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_process_pretrains_in_one_precision_after_another(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: True)
    for precision in ("no", "bf16"):
        settings = replace(_settings(drawn, tmp_path / precision), precision=precision)  # type: ignore[arg-type]
        assert pretrain(settings)["precision"] == precision


def test_public_names_exist() -> None:
    assert all(getattr(engine, name).__doc__ for name in engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pretain'"):
        _ = engine.pretain  # type: ignore[attr-defined]
