"""Files of encoders: pickles are refused and never run, junk is refused, checkpoints are read from their run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engine.checkpoint import storage
from engine.config.settings import Model, Settings
from engine.weights.load import load_encoder
from methods.registry import build_backbone
from pipeline.system.errors import InputError
from tests.engine.weights.conftest import State, backbone, prefixed


def test_the_newest_checkpoint_of_a_run_is_read(tmp_path: Path) -> None:
    settings = Settings(model=Model(arch="resnet18", stem="small", width=0.25))
    state: State = {}
    for number, side in enumerate(("online", "target")):
        torch.manual_seed(number)
        state |= prefixed(build_backbone("resnet18", stem="small", width=0.25).state_dict(), f"{side}.backbone.")
    about = {"loader": {}, "monitor": {}, "settings": settings.as_dict()}
    for step in (10, 20):
        storage.write(tmp_path / "run" / "checkpoints", step, {"model": state}, about)
    for path in (
        tmp_path / "run",
        tmp_path / "run" / "checkpoints",
        tmp_path / "run" / "checkpoints" / "step_00000020",
    ):
        loaded = load_encoder(path, "momentum")
        assert loaded.path.name == "step_00000020"
        assert (loaded.architecture.width, loaded.architecture.stem) == (0.25, "small")
        key = "layer1.0.conv1.weight"
        assert torch.equal(loaded.backbone.state_dict()[key], state[f"target.backbone.{key}"])
    (tmp_path / "run/checkpoints/step_00000020/model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="damaged"):
        load_encoder(tmp_path / "run/checkpoints/step_00000020")


class _Hostile:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self._target}",)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    file, owned = tmp_path / "x.pth", tmp_path / "owned"
    for legacy in (False, True):
        content = {"state_dict": backbone("resnet18"), "extra": _Hostile(owned)}
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match="refused") as raised:
            load_encoder(file)
        assert "system" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert not owned.exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04junk", b"\x80\x04junk", b"\x80\x02junk"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_junk_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.(pth|safetensors)"):
        load_encoder(file)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(backbone("resnet18"), tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_encoder(tmp_path / "x.pth")
