"""Checkpoints that are forged with valid hashes: a run checks all that it loads of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import compatibility, storage
from engine.config.cli import parse
from engine.training import resume
from engine.training.build import build
from pipeline.system.errors import InputError
from tests.engine.test_run import SMALL

Forge = Callable[[dict[str, Any], Any], object]


def _with(key: str, value: Any) -> Forge:
    return lambda saved, tensors: saved.update({key: value})


def _tensor(file: str, **values: torch.Tensor) -> Forge:
    return lambda saved, tensors: tensors.setdefault(file, {}).update(values)


FORGED: dict[str, Forge] = {
    "no backend": lambda saved, tensors: saved.pop("backend"),
    "no evaluations": lambda saved, tensors: saved.pop("evaluated"),
    "evaluated none": _with("evaluated", None),
    "evaluated x": _with("evaluated", "x"),
    "no loader": _with("loader", {}),
    "no monitor": _with("monitor", {}),
    "sums": _with("monitor", {"sums": 5}),
    "no settings": _with("settings", {}),
    "list of settings": _with("settings", {"data": []}),
    "statistics of no dimension": _tensor("ranks", running_statistics=torch.tensor(1.0)),
    "statistics of others": _tensor("ranks", running_statistics=torch.zeros(2, 3)),
    "no statistics": _tensor("ranks", other=torch.zeros(2, 3)),
    "a parameter more": _tensor("model", other=torch.zeros(2)),
    "a momentum more": _tensor("optimizer", other=torch.zeros(2)),
    "no optimizer": lambda saved, tensors: tensors.pop("optimizer"),
    "nothing": lambda saved, tensors: tensors.clear(),
}


def test_forged_state_is_refused(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoints" / "step_00000000"
    given = ["--data.train", str(drawn), *SMALL, "--optim.epochs", "1", "--knn.every", "0", "--out", str(tmp_path)]
    run = build(parse(given))
    try:
        resume.save(run)
        run.writer.finish()
        run.settings.resume = str(path)
        tensors, saved = storage.load(path)
        genuine = {key: value for key, value in saved.items() if key not in ("format", "step", "files")}
        for name, forge in FORGED.items():
            forged, files = dict(genuine), {file: dict(values) for file, values in tensors.items()}
            forge(forged, files)
            storage.write(path.parent, 0, files, forged)
            print(name)
            with contextlib.suppress(InputError):  # other values are checked later
                compatibility.check(run.settings, run.loader.beton.fingerprint, None)
            with pytest.raises(InputError):
                resume.restore(run)
        storage.write(path.parent, 0, tensors, genuine)
        resume.restore(run)
        assert "resumed from" in capsys.readouterr().err
    finally:
        run.close()
