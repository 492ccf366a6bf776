"""The kNN command, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.system.errors import InputError
from tests.engine.evaluate.conftest import evaluate
from tests.gloo import on_ranks


def test_every_pair_of_k_and_temperature_is_scored(encoder: Path, drawn: Path) -> None:
    result = evaluate("knn", encoder, drawn, "--k", "1", "5")
    assert {(row["k"], row["temperature"]) for row in result["every"]} == {(k, t) for k in (1, 5) for t in (0.07, 0.1)}
    assert result["images"] == 20  # every tenth of each class
    assert result["interval"][0] <= result["top1"] <= result["interval"][1]
    with pytest.raises(InputError, match="--k 500: choose 1 to 180"):
        evaluate("knn", encoder, drawn, "--k", "500")


def _on_two(encoder: str, drawn: str) -> None:
    evaluate("knn", Path(encoder), Path(drawn), "--k", "10", "150")


def test_two_ranks_score_as_one(encoder: Path, drawn: Path) -> None:
    """The 90 images of a rank are fewer than 150 neighbors: those of both ranks are merged."""
    alone = evaluate("knn", encoder, drawn, "--k", "10", "150")
    on_ranks(2, _on_two, str(encoder), str(drawn))
    both = json.loads((encoder.parent / "out" / "knn.json").read_text())
    assert both["world_size"] == 2
    assert both["every"] == alone["every"]
    assert both["per_class"] == alone["per_class"]
