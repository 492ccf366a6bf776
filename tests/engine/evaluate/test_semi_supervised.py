"""Fine-tuning: choice of labels, all of the network trained, exact after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.evaluate import semi_supervised
from pipeline.beton import Beton
from pipeline.system.errors import InputError
from tests.engine.evaluate.conftest import copy_of, evaluate, interrupt_once


def test_labels_are_drawn_evenly_by_seed() -> None:
    labels = np.repeat(np.arange(5), (100, 50, 30, 3, 200))
    chosen = semi_supervised.draw_balanced(labels, 0.1, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 3, 1, 20]
    assert (chosen == semi_supervised.draw_balanced(labels, 0.1, seed=1)).all()
    assert (chosen != semi_supervised.draw_balanced(labels, 0.1, seed=2)).any()


def test_labels_are_chosen_by_name(drawn: Path, tmp_path: Path) -> None:
    beton, names = Beton(drawn), tmp_path / "10percent.txt"
    names.write_text(f"{Path(beton.name(7)).name}\n{beton.name(3)}\n\n")
    assert semi_supervised.find_named(beton, names).tolist() == [3, 7]
    names.write_text("n01440764_10043.JPEG\n")
    with pytest.raises(InputError, match=r"n01440764_10043.JPEG and 0 others are not in .*drawn.beton"):
        semi_supervised.find_named(beton, names)
    names.write_text("\n")
    with pytest.raises(InputError, match="names no image: give one name a line"):
        semi_supervised.find_named(beton, names)


def test_the_backbone_is_trained_once(encoder: Path, drawn: Path) -> None:
    options = ["--labels", "0.5", "--epochs", "2", "--batch", "30"]
    first = evaluate("semi", encoder, drawn, *options)
    assert first["images"] == 90
    folder = encoder.parent / "out" / "semi_0.5"
    state = load_file(next(folder.glob("step_*/state.safetensors")))
    weights = torch.load(encoder, weights_only=True)
    assert not torch.equal(state["model|backbone.conv1.weight"], weights["conv1.weight"])
    again = evaluate("semi", encoder, drawn, *options)  # the last checkpoint: no epoch is left to train
    assert again["per_class"] == first["per_class"]
    assert again["training_seconds"] < first["training_seconds"]


def test_an_interrupted_training_resumes_exactly(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--labels", "0.5", "--epochs", "3", "--batch", "30"]
    undisturbed = evaluate("semi", encoder, drawn, *options)
    other = copy_of(encoder)
    saves = interrupt_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate("semi", other, drawn, *options)
    resumed = evaluate("semi", other, drawn, *options)
    assert saves == [1, 2, 3]
    assert resumed["per_class"] == undisturbed["per_class"]
    ends = [load_file(next(e.parent.glob("out/semi_0.5/step_*/state.safetensors"))) for e in (encoder, other)]
    assert ends[0].keys() == ends[1].keys()
    assert any(name.startswith("momentum|backbone.") for name in ends[0])
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
