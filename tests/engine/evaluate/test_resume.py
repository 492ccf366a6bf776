"""Saved state of evaluations: read back for the same settings only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.evaluate import resume
from engine.evaluate.resume import load_cached, save_cached, valid_ids


def test_cached_tensors_are_those_of_the_same_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    PartialState(cpu=True)
    path, tensors = tmp_path / "cache" / "x.safetensors", {"ids": torch.arange(3)}
    assert load_cached(path, {"a": 1}, lambda _: True) is None
    save_cached(path, {"a": 1}, tensors)
    cached = load_cached(path, {"a": 1}, lambda _: True)
    assert cached is not None
    assert torch.equal(cached["ids"], tensors["ids"])
    assert load_cached(path, {"a": 2}, lambda _: True) is None
    assert load_cached(path, {"a": 1}, lambda _: False) is None
    assert "do not fit these images: recomputing" in caplog.text


def test_former_names_of_settings_are_read(tmp_path: Path) -> None:
    PartialState(cpu=True)
    path = tmp_path / "x.safetensors"
    save_cached(path, {"share": 0.875, "processes": 2, "sizes": (1, 2)}, {"ids": torch.arange(3)})
    assert load_cached(path, {"crop_ratio": 0.875, "world_size": 2, "sizes": (1, 2)}, lambda _: True) is not None
    assert load_cached(path, {"crop_ratio": 0.9, "world_size": 2, "sizes": (1, 2)}, lambda _: True) is None


@pytest.mark.parametrize("settings", ["[]", "null", "3", "{", "[" * 100_000])
def test_hostile_settings_are_other_settings(settings: str, tmp_path: Path) -> None:
    PartialState(cpu=True)
    save_file({"ids": torch.arange(3)}, tmp_path / "x.safetensors", metadata={"settings": settings})
    assert load_cached(tmp_path / "x.safetensors", {}, lambda _: True) is None


def test_a_full_disk_is_an_os_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(resume, "save_file", fail)
    with pytest.raises(OSError, match="No space left") as raised:
        save_cached(tmp_path / "x.safetensors", {}, {})
    assert raised.value.errno == 28
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ids", "valid"),
    [
        (torch.tensor([0, 39]), True),
        (torch.zeros(0, dtype=torch.int64), True),
        (torch.tensor([40]), False),
        (torch.tensor([-1]), False),
        (torch.tensor([True]), False),
        (torch.tensor([0.5]), False),
        (torch.tensor([[0]]), False),
        (torch.zeros(41, dtype=torch.int64), False),
        (None, False),
    ],
)
def test_ids_are_integers_in_range(ids: torch.Tensor | None, valid: bool) -> None:
    assert valid_ids(ids, 40) == valid
