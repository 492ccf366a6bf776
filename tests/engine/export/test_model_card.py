"""A model card states the run's recipe, data, version, commit and metrics."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.checkpoint import provenance
from engine.config.cli import parse
from engine.evaluate.__main__ import run as evaluate
from engine.export.formats import export
from engine.export.model_card import card
from engine.training.loop import train
from engine.weights.load import load_encoder
from pipeline.beton import Beton
from tests.engine.run_folders import settings, write_checkpoint
from tests.engine.test_run import SMALL


def _part(text: str, name: str) -> str:
    """Return the text under a heading."""
    return text.split(f"## {name}\n\n")[1].split("\n## ")[0]


def _recipe(text: str) -> Any:
    return yaml.safe_load(_part(text, "Recipe").removeprefix("```yaml\n").split("```")[0])


def test_a_card_states_the_runs_facts(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of the training and that of the export are kept apart."""
    out, trained, exporting = tmp_path / "run", "0" * 39 + "1", "0" * 39 + "2"
    data = ["--data.train", str(drawn), "--data.eval", str(drawn)]
    with monkeypatch.context() as then:
        then.setattr("engine.checkpoint.provenance.commit", lambda: trained)
        train(
            parse([*data, *SMALL, "--precision", "no", "--optim.epochs", "1", "--optim.lr", "0.07", "--out", str(out)])
        )
    common = ["--train", str(drawn), "--size", "16", "--cpu", "--precision", "no", "--workers", "1"]
    evaluate(["knn", str(out), *common, "--k", "5"])
    monkeypatch.setattr("engine.export.model_card.commit", lambda: exporting)
    export(load_encoder(out), "safetensors", tmp_path / "x.safetensors")
    text = (tmp_path / "x.safetensors.md").read_text()

    assert re.findall(r"commit (\w+)", text) == [trained, exporting]
    assert text.index("checkpoint was written by") < text.index(trained) < text.index("Exported by")
    beton = Beton(drawn)
    expected = "Trained on `drawn.beton`, without labels: 200 images, of 10 classes, fingerprint "
    expected += f"`{beton.fingerprint}`."
    assert _part(text, "Data").strip() == expected
    assert _recipe(text) == yaml.safe_load((out / "config.yaml").read_text())
    assert _recipe(text)["optim"]["lr"] == 0.07
    online = next(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "knn_top1" in line)
    result = json.loads((out / "evaluation" / "knn.json").read_text())
    assert _part(text, "Metrics").strip().splitlines() == [
        f"- {result['evaluation']}: top-1 {result['top1']:.2%} (online encoder)",
        f"- kNN during training, after step {online['step']}: top-1 {online['knn_top1']:.2%}",
    ]


def test_cards_of_older_checkpoints_are_shorter(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, settings("train.beton"))
    loaded = load_encoder(tmp_path)
    assert loaded.origin == {}
    text = card(loaded, "safetensors", tmp_path / "x", 0.0)
    assert "Trained on `train.beton`, without labels." in text
    assert "checkpoint was written by" not in text


def test_provenance_is_escaped_and_shortened() -> None:
    state = {"loader": {"fingerprint": ["x"]}, "origin": {"version": "1\n## Metrics" + 200 * "x", "images": True}}
    origin = provenance.recorded(state)
    assert origin.keys() == {"version"}
    assert "\n" not in origin["version"]
    assert len(origin["version"]) < 120
    assert provenance.recorded({"loader": {}, "origin": 3}) == {}
    source = {"started_from": {"file": "/a/b\n.pth", "kind": "an official MoCo v3 checkpoint"}}
    assert provenance.recorded(source) == {"started_from": "b\\n.pth, an official MoCo v3 checkpoint"}
    assert provenance.recorded({"started_from": {}}) == {}


def test_cards_name_the_weights_that_a_run_started_from(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, settings("train.beton"))
    loaded = load_encoder(tmp_path)
    loaded.origin["started_from"] = "x.pth, a state dict"
    assert "without labels. Started from x.pth, a state dict." in card(loaded, "safetensors", tmp_path / "x", 0.0)


def test_the_commit_is_of_the_projects_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of another repository that contains the installed packages."""
    if (provenance._ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", provenance.commit.__wrapped__())
    around = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*around, "init", "-q"], check=True)
    subprocess.run([*around, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(provenance, "_ROOT", installed)
    assert provenance.commit.__wrapped__() == ""
    (installed / ".git").write_text("gitdir: nowhere")
    assert provenance.commit.__wrapped__() == ""
