"""A run's curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pipeline.limits import json_lines


def curves(metrics: Path, out: Path, levels: Mapping[str, float] | None = None) -> None:
    """Draw loss and kNN top-1 over epochs from a metrics.jsonl to `out`, a PNG; `levels`: kNN values to compare."""
    lines = [said for _, said in json_lines(metrics)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses = [(line["epoch"], line["loss"]) for line in lines if "loss" in line]
    left.plot(*zip(*losses, strict=True))
    left.set(xlabel="epoch", ylabel="loss")
    found = [(line["epoch"], 100 * line["knn_top1"]) for line in lines if "knn_top1" in line]
    if found:
        right.plot(*zip(*found, strict=True), marker="o", label="trained encoder")
    for number, (name, level) in enumerate((levels or {}).items()):
        right.axhline(100 * level, linestyle="--", color=f"C{number + 1}", label=name)
    right.set(xlabel="epoch", ylabel="kNN top-1, %", ylim=(0, 100))
    if found or levels:
        right.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)
