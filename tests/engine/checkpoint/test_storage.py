"""Checkpoints: exact round trips, and damage that is detected and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoint import storage
from pipeline.system.errors import InputError

STATE = {"loader": {"epoch": 1}, "monitor": {}, "settings": {}, "note": "ü"}


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(step)
    return {
        "model": {"w": torch.randn(3, 4), "n": torch.tensor(step), "half": torch.randn(5).bfloat16()},
        "optimizer": {"w|momentum_buffer": torch.randn(3, 4).to(memory_format=torch.contiguous_format)},
    }


def write(folder: Path, step: int, keep: int = 0, keep_every: int = 0) -> Path:
    path = storage.write(folder, step, tensors_of(step), STATE)
    storage.settle(folder, step, keep, keep_every)
    return path


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    tensors, state = storage.load(path)
    torch.manual_seed(7)
    assert torch.equal(tensors["model"]["w"], torch.randn(3, 4))
    assert tensors["model"]["half"].dtype == torch.bfloat16
    assert (tensors["model"]["n"].item(), state["step"], state["loader"], state["note"]) == (7, 7, {"epoch": 1}, "ü")
    assert set(tensors["optimizer"]) == {"w|momentum_buffer"}


def test_newest_is_found_and_older_ones_are_removed(tmp_path: Path) -> None:
    for step in (5, 90, 100, 1000):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000100", "step_00001000"]
    assert (tmp_path / "latest").read_text() == "step_00001000"
    assert storage.newest(tmp_path) == (tmp_path / "step_00001000", [])
    assert not list(tmp_path.glob(".*writing"))


def test_multiples_of_keep_every_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        write(tmp_path, step, keep=2, keep_every=3)
    assert [storage.step_of(p) for p in sorted(tmp_path.glob("step_*"))] == [3, 6, 8, 9]


def test_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert storage.newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "junk"])
def test_damaged_file_is_named_and_the_previous_checkpoint_used(tmp_path: Path, name: str, damage: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    path = bad / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    new = {"flip": bytes(data), "truncate": bytes(data[:-3]), "empty": b"", "junk": b"\x80\x04junk"}
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(new[damage])
    with pytest.raises(InputError, match="step_00000002"):
        storage.load(bad)
    newest, broken = storage.newest(tmp_path)
    assert newest == good
    assert len(broken) == 1
    assert "step_00000002" in broken[0]


def test_unfinished_checkpoint_is_ignored(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    (tmp_path / ".step_00000002.writing").mkdir()
    assert storage.newest(tmp_path)[0] == good
    write(tmp_path, 2)
    assert storage.newest(tmp_path)[0] == tmp_path / "step_00000002"


def test_other_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1) / "state.json"
    state = json.loads(path.read_text())
    state["format"] = 99
    state.pop("sha256")
    state["sha256"] = storage._hash_of(state)
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match="format 99"):
        storage.load(path.parent)


@pytest.mark.gpu
def test_checkpoint_of_gpu_tensors_does_not_wait_for_later_steps(tmp_path: Path) -> None:
    """Copies are of the moment of `save`; the second checkpoint reuses the first's pinned memory."""
    tensors = {"a": torch.arange(5.0, device="cuda"), "b": torch.ones(3, 2, dtype=torch.bfloat16, device="cuda").t()}
    tensors["c"] = torch.tensor(7, device="cuda")
    writer = storage.Writer(tmp_path, keep=2)
    for step in (1, 2):
        expected = {name: value.cpu() for name, value in tensors.items()}
        writer.save(step, {"model": tensors}, STATE)
        torch.cuda._sleep(5_000_000_000)  # seconds of the steps that follow
        busy = torch.cuda.current_stream().record_event()
        tensors["a"] += 1
        writer.finish()
        assert not busy.query()
        found, _ = storage.load(tmp_path / f"step_{step:08d}")
        assert all(torch.equal(found["model"][name], value) for name, value in expected.items())
        torch.cuda.synchronize()
