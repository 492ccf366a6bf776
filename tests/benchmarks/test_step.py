"""The step benchmark measures each way and part, and its official loop is the algorithm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import step
from tests.engine.small import settings

SMALL = ["--model.arch", "resnet18", "--model.stem", "small", "--model.width", "0.25", "--data.size", "16"]
SMALL += ["--data.batch", "8", "--method.queue", "32", "--model.bn", "plain", "--data.augmentation", "moco_v2_32"]


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["step", *SMALL, *arguments])
    with pytest.raises(SystemExit) as ended:
        step.main()
    return int(ended.value.code or 0)


def test_ways_and_parts_are_measured_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    out = ["--ways", "eager,official,official-amp", "--runs", "3", "--json", str(tmp_path / "r.json")]
    assert main(monkeypatch, *out, "--terms", "[co2]") == 0
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["ways"]) == {"eager", "official", "official-amp"}
    for taken in (*result["ways"].values(), *result["parts"].values()):
        assert 0 <= taken["wall"]["min"] <= taken["wall"]["median"] <= taken["wall"]["max"]
    assert {"encoder, queries", "encoder, keys", "moving average", "queue", "optimiser"} < set(result["parts"])
    medians = {name: taken["cpu"]["median"] for name, taken in result["ways"].items()}
    assert result["ratio_to_official"]["eager"] == pytest.approx(medians["official"] / medians["eager"])
    assert 0 < result["share_beside_the_encoders"] < 1


def test_other_methods_have_no_official_loop_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--ways", "warp") == 2
    monkeypatch.setattr(sys, "argv", ["step", "--method.name", "simclr", "--ways", "eager,official"])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 2
    assert "the official loop is MoCo's" in capsys.readouterr().err


def test_the_official_loop_is_moco() -> None:
    """Its first loss by hand, the queue's next columns, and the moving average before the keys."""
    chosen = settings("moco_v2")
    official = step.Official(
        step.build_model(chosen, step.Accelerator(cpu=True)).step.encoder, chosen, torch.device("cpu"), None
    )
    views = (torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8))
    queue, online = official._queue.clone(), step.copy.deepcopy(official._online)
    loss = official.step(views)
    q, k = (F.normalize(online(view)[0], dim=1) for view in views)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
    assert loss == pytest.approx(F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).item(), rel=1e-4)
    assert torch.allclose(official._queue[:, :8], k.T, atol=1e-4)
    assert torch.equal(official._queue[:, 8:], queue[:, 8:])
