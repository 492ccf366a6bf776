"""A run and a beton that Millrace 0.1.0 wrote are read as by it.

run_of_0.1.0.tar.xz: images.beton, and `run`, five steps into a run of ten, its weights rounded to two values a tensor.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pipeline.beton import Beton
from pipeline.inspect import verify
from tests.engine.test_run import main, metrics

ARCHIVE = Path(__file__).with_name("run_of_0.1.0.tar.xz")
LOSSES = [3.040243625640869, 2.7864162921905518, 2.8558387756347656, 3.137467622756958, 3.046121120452881]
"""Losses of steps 6 to 10 as 0.1.0 resumed it."""


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_beton_is_intact(unpacked: Path) -> None:
    beton = Beton(unpacked / "images.beton")
    assert len(beton) == 40
    assert not list(verify(beton, quiet=True))


def test_run_resumes_to_the_same_losses(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.yaml and its checkpoint have the former names of settings, its files former names too."""
    monkeypatch.chdir(unpacked)
    assert main(monkeypatch, "--config", "run/config.yaml", "--resume", "auto") == 0
    losses = {line["step"]: line["loss"] for line in metrics(unpacked / "run") if "loss" in line}
    assert [losses[step] for step in range(6, 11)] == pytest.approx(LOSSES, rel=1e-3)
    assert metrics(unpacked / "run")[-1]["knn_top1"] == pytest.approx(0.25, abs=0.05)
