"""The loader benchmark measures both paths and says on what."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loader


def test_both_paths_are_measured_and_written_down(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    arguments = ["--size", "32", "--batch", "50", "--runs", "2", "--json", str(tmp_path / "results" / "r.json")]
    monkeypatch.setattr(sys, "argv", ["loader", "--data", str(drawn), *arguments])
    with pytest.raises(SystemExit) as ended:
        loader.main()
    torch.set_num_threads(threads)
    assert not ended.value.code
    result = json.loads((tmp_path / "results" / "r.json").read_text())
    rates = [result[name]["cpu"] for name in ("ours", "ffcv_twice")]
    assert all(0 < rate["min"] <= rate["median"] <= rate["max"] for rate in rates)
    assert result["ratio"] == pytest.approx(rates[0]["median"] / rates[1]["median"])
    assert result["machine"]["versions"]["ffcv"]
    assert f"ratio       {result['ratio']:7.2f}" in capsys.readouterr().out


def test_a_batch_larger_than_the_data_is_refused(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--data", str(drawn), "--batch", "201"])
    with pytest.raises(SystemExit) as ended:
        loader.main()
    assert ended.value.code == 2
