"""Pretraining from Python: the same run, with callbacks, several in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import notebook_launcher
from PIL import Image

import engine
from engine import Callback, Knn, Settings, load_encoder, pretrain
from engine.config.cli import parse
from engine.evaluate.__main__ import run as evaluate
from engine.export.formats import export
from engine.parallel import accelerator
from engine.parallel.rendezvous import rank
from pipeline.augment.color import Statistics
from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.storage.decode import decode
from pipeline.system.errors import InputError
from tests import processes
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


def test_an_encoder_keeps_the_normalization_of_its_run(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its checkpoint, a resumed run, its preprocessing, an exported file and its card, and evaluations."""
    out, chosen = tmp_path / "run", _settings(drawn, tmp_path / "run")
    data = replace(chosen.data, mean="auto", std=[0.9, 0.8, 1.0], eval="", views=[{"hue": 0}, {"vflip": 0.5}])
    pretrain(replace(chosen, data=data))
    manifest = Beton(drawn).manifest
    assert manifest is not None
    saved = parse(["--config", str(out / "config.yaml")]).data
    assert (saved.mean, saved.std, saved.views) == (manifest.mean, data.std, data.views)
    longer = replace(chosen.optim, epochs=2)
    pretrain(replace(chosen, data=data, resume="auto", optim=longer, allow_change=["optim.epochs"]))

    encoder = load_encoder(out)
    export(encoder, "safetensors", tmp_path / "x.safetensors")
    statistics = Statistics(tuple(manifest.mean), (0.9, 0.8, 1.0))  # type: ignore[arg-type]
    assert (
        f"normalized by mean {statistics.mean} and standard deviation {statistics.std}"
        in (tmp_path / "x.safetensors.md").read_text()
    )
    exported = load_encoder(tmp_path / "x.safetensors")
    assert encoder.preprocess.statistics == exported.preprocess.statistics == statistics
    pixels = torch.from_numpy(np.array(Image.new("RGB", (20, 20), (9, 90, 200)))).permute(2, 0, 1) / 255
    normal = (pixels[:, :16, :16] - torch.tensor(manifest.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    assert torch.allclose(exported.preprocess(Image.new("RGB", (20, 20), (9, 90, 200))), normal)

    common = ["--train", str(drawn), "--size", "16", "--cpu", "--precision", "no", "--workers", "1"]
    for source in (out, tmp_path / "x.safetensors"):
        evaluate(["features", str(source), *common, "--out", str(tmp_path / "features.npy")])
        images = torch.stack([encoder.preprocess(decode(Beton(drawn), index)) for index in range(4)])
        with torch.no_grad():
            expected = encoder.backbone(images)
        features = torch.from_numpy(np.load(tmp_path / "features.npy"))[:4]
        assert (features - expected).abs().max() < 0.02 * expected.abs().max()  # pixels differ by a level
        with torch.no_grad():
            other = encoder.backbone((images * torch.tensor(data.std).view(3, 1, 1)) / 0.225)
        assert (other - expected).abs().max() > 0.2 * expected.abs().max()


def test_several_betons_train_as_one_and_a_part_more_is_another_set(drawn: Path, tmp_path: Path) -> None:
    for number, (first, count) in enumerate(((0, 90), (90, 110), (200, 3))):
        prepare(f"synthetic:{first}:{count}", tmp_path / f"{number}.beton", workers=1, quiet=True)
    (tmp_path / "2.beton").rename(tmp_path / "later")
    summaries = [
        pretrain(_settings(path, tmp_path / out)) for path, out in ((drawn, "one"), (tmp_path / "*.beton", "parts"))
    ]
    assert [summaries[0][key] for key in ("loss", "knn_top1")] == [summaries[1][key] for key in ("loss", "knn_top1")]
    (tmp_path / "later").rename(tmp_path / "2.beton")
    again = replace(_settings(tmp_path / "*.beton", tmp_path / "parts"), resume="auto", allow_change=["data.eval"])
    with pytest.raises(InputError, match=r"\(fingerprint 3-parts-203-\w+, there 2-parts-200-\w+\): resume with"):
        pretrain(again)


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


class RankRecorder(Recorder):
    """Writes what this rank received to a file of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        super().on_evaluation(step, metrics)
        (self.folder / f"rank{rank()}.json").write_text(json.dumps(self.lines))


@pytest.mark.slow
def test_notebook_launcher_trains_on_two_ranks_with_callbacks(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank's callbacks receive the lines of the metrics."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = _settings(drawn, tmp_path / "run")
    launched = processes.call(notebook_launcher, pretrain, (settings, [RankRecorder(tmp_path)]), 2)
    assert launched.wait(120) == 0, launched.communicate()[1]
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (json.loads((tmp_path / f"rank{n}.json").read_text()) for n in range(2))
    assert first == written
    clocks = {"pairs_per_second", "data_wait_fraction"}
    for line, other in zip(first, second, strict=True):
        assert {key for key in line if line[key] != other[key]} <= clocks
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_public_names_exist() -> None:
    assert all(getattr(engine, name).__doc__ for name in engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pretain'"):
        _ = engine.pretain  # type: ignore[attr-defined]
