"""The step benchmark measures each way and part, and its official loop is the algorithm."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import step
from benchmarks.common import peers
from tests.engine.small import settings

SMALL = ["--model.arch", "resnet18", "--model.stem", "small", "--model.width", "0.25", "--data.size", "16"]
SMALL += ["--data.batch", "8", "--method.queue_size", "32", "--model.bn", "plain", "--data.augmentation", "moco_v2_32"]


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["step", *SMALL, *arguments])
    with pytest.raises(SystemExit) as ended:
        step.main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_ways_and_parts_are_measured_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    out = ["--ways", "eager,official,official-amp", "--runs", "3", "--json", str(tmp_path / "r.json")]
    out += ["--markdown", str(tmp_path / "r.md")]
    assert main(monkeypatch, *out, "--terms", "[co2]") == 0
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["ways"]) == {"eager", "official", "official-amp"}
    for taken in (*result["ways"].values(), *result["parts"].values()):
        assert 0 <= taken["wall"]["min"] <= taken["wall"]["median"] <= taken["wall"]["max"]
    assert {"encoder, queries", "encoder, keys", "moving average", "queue", "optimizer"} < set(result["parts"])
    for name in ("pairs_per_second", "ratio_to_official", "tflops"):
        assert set(result[name]) == set(result["ways"])
    assert result["ratio_to_official"]["official"] == {"median": 1, "min": 1, "max": 1}
    assert 0 < result["share_beside_the_encoders"]["eager"]["min"] < 1
    assert result["matrix_tflops"] > 0
    table = (tmp_path / "r.md").read_text()
    assert table.startswith("# Training step\n")
    assert f"| eager | {1000 * result['ways']['eager']['wall']['median']:.1f} (" in table
    assert "--terms '[co2]'" in table


def test_ratios_and_shares_are_taken_run_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow moment that falls on one run of all."""
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


def test_recomputing_is_not_counted_as_work() -> None:
    chosen = replace(settings("moco_v2"), data=replace(settings().data, augmentation="moco_v2_32"))
    accelerator, counts = step.Accelerator(cpu=True), []
    for recompute in (False, True):
        model = step.build_model(replace(chosen, activation_checkpointing=recompute), accelerator)
        counts.append(step.flops_a_step(replace(chosen, activation_checkpointing=recompute), model, accelerator))
    assert counts[0] == counts[1] > 0


def test_other_methods_have_no_official_loop_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--ways", "warp") == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(monkeypatch, "--ways", "lightly") == 2
    assert "pip install lightly" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["step", "--method.name", "simclr", "--ways", "eager,official"])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 2
    assert "the other loops are MoCo v2's" in capsys.readouterr().err


def test_the_official_loop_is_moco() -> None:
    """Its first loss by hand, the queue's next columns, and the moving average before the keys."""
    chosen = settings("moco_v2")
    official = peers.Official(
        step.build_model(chosen, step.Accelerator(cpu=True)).step.encoder, chosen, torch.device("cpu"), None
    )
    views = (torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    queue, online = official._queue.clone(), copy.deepcopy(official._online)
    loss = official.step(views)
    q, k = (F.normalize(online(view)[0], dim=1) for view in views)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
    assert loss == pytest.approx(F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).item(), rel=1e-4)
    assert torch.allclose(official._queue[:, :8], k.T, atol=1e-4)
    assert torch.equal(official._queue[:, 8:], queue[:, 8:])


def test_lightlys_loop_is_moco() -> None:
    """Its second loss by hand, from its own networks and memory bank."""
    pytest.importorskip("lightly.loss")
    chosen = settings("moco_v2")
    encoder = step.build_model(chosen, step.Accelerator(cpu=True)).step.encoder
    theirs = peers.Lightly(encoder, chosen, torch.device("cpu"), None)
    views = (torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    theirs.step(views)  # its bank is made at the first step
    bank = theirs._criterion.memory_bank.bank.clone()
    online = copy.deepcopy((theirs._backbone, theirs._head))
    momentum = copy.deepcopy((theirs._backbone_momentum, theirs._head_momentum))
    loss = theirs.step(views)
    with torch.no_grad():
        for ours, follows in zip(online, momentum, strict=True):
            for p, m in zip(ours.parameters(), follows.parameters(), strict=True):
                m.copy_(0.999 * m + 0.001 * p)
        networks = zip((online, momentum), views, strict=True)
        q, k = (F.normalize(head(backbone(view).flatten(1)), dim=1) for (backbone, head), view in networks)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.T], 1) / 0.2
    assert loss == pytest.approx(F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).item(), rel=1e-3)
