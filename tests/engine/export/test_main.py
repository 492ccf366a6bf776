"""The command line of `python -m engine.export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import save_file

from engine.export.__main__ import main
from engine.weights.architecture import Architecture
from engine.weights.readers import METADATA


def test_a_file_and_its_card_are_written_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, source, out = (
        Architecture("resnet18", "small", 0.25, 32),
        tmp_path / "x.safetensors",
        tmp_path / "y.safetensors",
    )
    save_file(architecture.build().state_dict(), source, metadata={METADATA: json.dumps(asdict(architecture))})
    monkeypatch.setattr("sys.argv", ["export", str(source), "--format", "safetensors", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert f"written: {out} and y.safetensors.md" in capsys.readouterr().out
    assert out.exists()


def test_to_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["export", "runs/a", "--to", "x.pth"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --to: renamed to --out\n"
