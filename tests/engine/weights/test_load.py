"""Encoders from files: official layouts are matched whole, wrong files refused or warned of by name, no pickle run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.checkpoint import storage
from engine.config.settings import Model, Settings
from engine.weights.key_maps import Library, ours, renamed
from engine.weights.load import digest, load_encoder
from methods.registry import build_backbone
from pipeline.system.errors import InputError

State = dict[str, torch.Tensor]
_KEYS = Path(__file__).parents[1] / "export"


@functools.cache
def _drawn(arch: str) -> State:
    torch.manual_seed(0)
    state = build_backbone(arch).state_dict()
    for name, value in state.items():
        if "running_var" in name:
            value.uniform_(0.5, 2)
    return state


def _backbone(arch: str) -> State:
    """A backbone's state whose running statistics and positions are not those of another seed."""
    return {name: value.clone() for name, value in _drawn(arch).items()}


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def _linear(prefix: str, *sizes: int) -> State:
    return {f"{prefix}.weight": torch.zeros(*sizes), f"{prefix}.bias": torch.zeros(sizes[0])}


def _norm(prefix: str, width: int, affine: bool = True) -> State:
    return _prefixed(nn.BatchNorm1d(width, affine=affine).state_dict(), f"{prefix}.")


def _moco_v1(encoder: State) -> State:
    """Keys of facebookresearch/moco's `builder.py` under DistributedDataParallel, --mlp left out."""
    queue = {"module.queue": torch.zeros(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    both = {}
    for side in ("q", "k"):
        both |= _prefixed(encoder, f"module.encoder_{side}.") | _linear(f"module.encoder_{side}.fc", 128, 2048)
    return both | queue


def _moco_v2(encoder: State) -> State:
    """The same with --mlp, whose head is fc.0 and fc.2."""
    state = {name: value for name, value in _moco_v1(encoder).items() if ".fc." not in name}
    for side in ("q", "k"):
        for layer, sizes in ((0, (2048, 2048)), (2, (128, 2048))):
            state |= _linear(f"module.encoder_{side}.fc.{layer}", *sizes)
    return state


def _moco_v3(encoder: State) -> State:
    """Keys of facebookresearch/moco-v3's `builder.py`: projector fc (ResNet) or head (ViT), and a predictor."""
    head = "head" if "cls_token" in encoder else "fc"
    state: State = {}
    for side in ("base_encoder", "momentum_encoder"):
        state |= _prefixed(encoder, f"module.{side}.")
        state |= {f"module.{side}.{head}.0.weight": torch.zeros(8, 8)} | _norm(f"module.{side}.{head}.1", 8)
        state |= {f"module.{side}.{head}.3.weight": torch.zeros(8, 8)} | _norm(f"module.{side}.{head}.4", 8, False)
    return state | {"module.predictor.0.weight": torch.zeros(8, 8)} | _norm("module.predictor.1", 8)


@pytest.mark.parametrize(
    ("layout", "arch", "kind"),
    [
        (_moco_v1, "resnet50", "MoCo v1 or v2"),
        (_moco_v2, "resnet50", "MoCo v1 or v2"),
        (_moco_v3, "resnet50", "MoCo v3"),
        (_moco_v3, "vit_small", "MoCo v3"),
    ],
)
@pytest.mark.parametrize("which", ["online", "momentum"])
def test_official_checkpoints_are_matched_whole(
    layout: Callable[[State], State], arch: str, kind: str, which: str, tmp_path: Path
) -> None:
    encoder = _backbone(arch)
    other = {name: value + 1 if value.is_floating_point() else value for name, value in encoder.items()}
    prefix = {"online": ("encoder_q", "base_encoder"), "momentum": ("encoder_k", "momentum_encoder")}[which]
    content = layout(other)
    for name in content:
        _, side, rest = (*name.split(".", 2), "")[:3]
        if side in prefix and rest in encoder:
            content[name] = encoder[rest]
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    file = tmp_path / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": arch, "state_dict": content, "optimizer": optimizer}, file)
    loaded = load_encoder(file, which)  # type: ignore[arg-type]
    assert kind in loaded.kind
    assert loaded.architecture.arch == arch
    assert loaded.matched == len(encoder)
    assert not loaded.warnings
    assert not loaded.backbone.training
    state = loaded.backbone.state_dict()
    assert all(torch.equal(state[name], value) for name, value in encoder.items())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vit_small"])
def test_loading_draws_nothing(arch: str, tmp_path: Path) -> None:
    save_file(_backbone(arch), tmp_path / "encoder.safetensors")
    before = torch.get_rng_state()
    load_encoder(tmp_path / "encoder.safetensors", heads=12 if arch == "vit_small" else 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("library", ["torchvision", "timm", "detectron2", "mmdet"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vit_small"])
def test_names_of_other_libraries_come_back(library: Library, arch: str, tmp_path: Path) -> None:
    encoder = _backbone(arch)
    theirs = renamed(encoder, library, transformer=arch == "vit_small")
    assert list(ours(theirs)) == list(encoder)
    save_file({name: value.contiguous() for name, value in theirs.items()}, tmp_path / "x.safetensors")
    loaded = load_encoder(tmp_path / "x.safetensors", heads=12 if arch == "vit_small" else 0)
    assert loaded.matched == len(encoder)
    assert digest(loaded.backbone) == digest(_module(arch, encoder))


def _module(arch: str, state: State) -> nn.Module:
    module = build_backbone(arch)
    module.load_state_dict(state)
    return module


def test_a_millrace_checkpoint_gives_the_encoder_it_was_asked_for(tmp_path: Path) -> None:
    settings = Settings(model=Model(arch="resnet18", stem="small", width=0.25))
    state: State = {}
    for number, side in enumerate(("online", "target")):
        torch.manual_seed(number)
        state |= _prefixed(build_backbone("resnet18", stem="small", width=0.25).state_dict(), f"{side}.backbone.")
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


def _without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(names)}


def _rotated(state: State) -> State:
    values = list(state.values())
    return dict(zip(state, values[1:] + values[:1], strict=True))


def _variances_exchanged(state: State) -> State:
    """Shapes stay: means where variances should be."""
    swapped = {"bn1.running_var": state["bn1.running_mean"] - 1, "bn1.running_mean": state["bn1.running_var"]}
    return state | swapped


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: _without(s, "conv1."), "conv1.weight of the backbone is missing"),
        (lambda s: _without(s, "bn1."), r"bn1.weight, (encoder_q\.)?bn1.bias"),
        (lambda s: _without(s, "layer3.1.bn1.weight"), "layer3.1.bn1.weight"),
        (lambda s: _without(s, "layer4.1."), r"\[2, 2, 2, 1\] basic blocks"),
        (_rotated, "in disorder"),
        (_variances_exchanged, "bn1.running_var holds negative variances"),
        (lambda s: s | {"bn1.weight": s["bn1.weight"] * torch.nan}, "bn1.weight holds numbers that are not finite"),
        (lambda s: {"weight": torch.zeros(3)}, "no backbone"),
    ],
    ids=["no stem", "no stem norm", "one key", "one block", "rotated", "exchanged", "nan", "other"],
)
def test_wrong_encoders_are_refused_by_name(spoil: Callable[[State], State], says: str, tmp_path: Path) -> None:
    for number, prefix in enumerate(("", "module.encoder_q.")):
        file = tmp_path / f"{number}.pth"
        torch.save({"state_dict": _prefixed(spoil(_backbone("resnet18")), prefix)}, file)
        with pytest.raises(InputError, match=says.replace("conv1.weight", ".*conv1.weight")) as raised:
            load_encoder(file)
        assert "\n" not in str(raised.value)


def test_a_supervised_head_is_warned_of_by_name(tmp_path: Path) -> None:
    torch.save(_backbone("resnet18") | _linear("fc", 1000, 512), tmp_path / "x.pth")
    loaded = load_encoder(tmp_path / "x.pth")
    assert any("fc.weight [1000, 512], fc.bias [1000]" in warning for warning in loaded.warnings)
    torch.save(_backbone("resnet18") | {"layer1.0.se.weight": torch.zeros(3)}, tmp_path / "x.pth")
    assert any("layer1.0.se.weight" in warning for warning in load_encoder(tmp_path / "x.pth").warnings)


def test_heads_of_a_small_transformer_are_asked_for(tmp_path: Path) -> None:
    torch.save(_backbone("vit_small"), tmp_path / "x.pth")
    with pytest.raises(InputError, match="--heads"):
        load_encoder(tmp_path / "x.pth")
    assert load_encoder(tmp_path / "x.pth", heads=6).architecture.heads == 6


def test_counters_may_be_absent(tmp_path: Path) -> None:
    state = {name: value for name, value in _backbone("resnet18").items() if "num_batches" not in name}
    torch.save(state, tmp_path / "x.pth")
    assert load_encoder(tmp_path / "x.pth").matched == len(state)


class _Hostile:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self._target}",)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    file, owned = tmp_path / "x.pth", tmp_path / "owned"
    for legacy in (False, True):
        content = {"state_dict": _backbone("resnet18"), "extra": _Hostile(owned)}
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match="refused") as raised:
            load_encoder(file)
        assert "system" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert not owned.exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04junk", b"\x80\x04junk", b"\x80\x02junk"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_junk_is_refused_in_one_line(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.(pth|safetensors)"):
        load_encoder(file)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(_backbone("resnet18"), tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_encoder(tmp_path / "x.pth")
