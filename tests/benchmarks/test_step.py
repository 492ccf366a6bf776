"""The step benchmark, and the other projects' loops."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from tests.benchmarks.conftest import Run
from tests.engine.small import settings

SMALL = ["--model.arch", "resnet18", "--model.stem", "small", "--model.width", "0.25", "--data.size", "16"]
SMALL += ["--data.batch", "8", "--method.queue_size", "32", "--model.bn", "plain", "--data.augmentation", "moco_v2_32"]


@pytest.mark.slow
def test_steps_and_parts_are_timed(tmp_path: Path, run: Run) -> None:
    threads = torch.get_num_threads()
    out = ["--compare", "eager,official,official-amp", "--runs", "3", "--json", str(tmp_path / "r.json")]
    out += ["--markdown", str(tmp_path / "r.md")]
    assert run(step, *SMALL, *out, "--terms", "[co2]") == 0
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["ways"]) == {"eager", "official", "official-amp"}
    for taken in (*result["ways"].values(), *result["parts"].values()):
        assert 0 <= taken["wall"]["min"] <= taken["wall"]["median"] <= taken["wall"]["max"]
    assert {"encoder, queries", "encoder, keys", "moving average", "queue", "optimizer"} < set(result["parts"])
    for name in ("pairs_per_second", "ratio_to_official", "tflops"):
        assert set(result[name]) == set(result["ways"])
    assert result["ratio_to_official"]["official"] == {"median": 1, "min": 1, "max": 1}
    assert 0 < result["share_outside_encoders"]["eager"]["min"] < 1
    assert result["matrix_tflops"] > 0
    table = (tmp_path / "r.md").read_text()
    assert table.startswith("# Training step\n")
    assert f"| eager | {1000 * result['ways']['eager']['wall']['median']:.1f} (" in table
    assert "--terms '[co2]'" in table


@pytest.mark.slow
def test_steps_are_timed_alone(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    options = ["--no-parts", "--cudnn-benchmark", "off", "--torch-threads", "1", "--json", str(tmp_path / "r.json")]
    assert run(step, *SMALL, "--compare", "eager,eager-graph", "--runs", "1", *options) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["ways"]) == {"eager", "eager-graph"}
    assert result["parts"] == result["share_outside_encoders"] == {}
    assert result["cudnn_benchmark"] is False
    assert not torch.backends.cudnn.benchmark


def test_ratios_and_shares_are_taken_run_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although one run of all is slow."""
    times = iter([1.0, 1.0, 5.0, 1.0] * 99)

    def clock(call: Any, device: Any) -> dict[str, float]:
        call()
        return dict.fromkeys(("wall", "cpu"), moment[0] * lasts[call])

    moment, lasts = [1.0], dict[Any, float]()
    monkeypatch.setattr(step, "clock", clock)

    def begin_run() -> None:
        moment[0] = next(times)

    def none() -> None:
        pass

    calls = {"first": begin_run, "second": none}
    lasts.update({begin_run: 2.0, none: 3.0})
    taken = step.in_turn(calls, torch.device("cpu"), 6, 0)
    assert sorted(taken["first"]["cpu"]) == [2, 2, 2, 2, 2, 10]
    assert set(taken["second"]["cpu"] / taken["first"]["cpu"]) == {1.5}


def test_recomputed_operations_are_not_counted() -> None:
    chosen = replace(settings("moco_v2"), data=replace(settings().data, augmentation="moco_v2_32"))
    accelerator, counts = step.Accelerator(cpu=True), []
    for recompute in (False, True):
        model = step.build_model(replace(chosen, activation_checkpointing=recompute), accelerator)
        counts.append(step.flops_a_step(replace(chosen, activation_checkpointing=recompute), model, accelerator))
    assert counts[0] == counts[1] > 0


def test_wrong_comparisons_are_rejected(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, message in (
        (["--compare", "warp"], "choose one of eager"),
        (["--compare", "lightly"], "pip install lightly"),
        (["--compare", "eager,official", "--method.name", "simclr"], "the other loops are MoCo v2's"),
    ):
        assert run(step, *arguments) == 2
        assert message in capsys.readouterr().err
