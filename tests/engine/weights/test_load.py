"""Encoders from files: official layouts are matched completely, wrong encoders refused with the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.weights.load import load_encoder
from pipeline.system.errors import InputError
from tests.engine.weights.conftest import State, backbone, prefixed


def _linear(prefix: str, *sizes: int) -> State:
    return {f"{prefix}.weight": torch.zeros(*sizes), f"{prefix}.bias": torch.zeros(sizes[0])}


def _norm(prefix: str, width: int, affine: bool = True) -> State:
    return prefixed(nn.BatchNorm1d(width, affine=affine).state_dict(), f"{prefix}.")


def _moco_v1(encoder: State) -> State:
    """Return keys as of facebookresearch/moco's `builder.py` under DistributedDataParallel, without --mlp."""
    queue = {"module.queue": torch.zeros(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    both = {}
    for side in ("q", "k"):
        both |= prefixed(encoder, f"module.encoder_{side}.") | _linear(f"module.encoder_{side}.fc", 128, 2048)
    return both | queue


def _moco_v2(encoder: State) -> State:
    """Return the same with --mlp: the head is fc.0 and fc.2."""
    state = {name: value for name, value in _moco_v1(encoder).items() if ".fc." not in name}
    for side in ("q", "k"):
        for layer, sizes in ((0, (2048, 2048)), (2, (128, 2048))):
            state |= _linear(f"module.encoder_{side}.fc.{layer}", *sizes)
    return state


def _moco_v3(encoder: State) -> State:
    """Return keys as of facebookresearch/moco-v3's `builder.py`: projector fc (ResNet) or head (ViT), predictor."""
    head = "head" if "cls_token" in encoder else "fc"
    state: State = {}
    for side in ("base_encoder", "momentum_encoder"):
        state |= prefixed(encoder, f"module.{side}.")
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
def test_official_checkpoints_are_matched_completely(
    layout: Callable[[State], State], arch: str, kind: str, which: str, tmp_path: Path
) -> None:
    encoder = backbone(arch)
    # one stored number a tensor
    other = {name: torch.tensor(9).to(value.dtype).expand(value.shape) for name, value in encoder.items()}
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
    save_file(backbone(arch), tmp_path / "encoder.safetensors")
    before = torch.get_rng_state()
    load_encoder(tmp_path / "encoder.safetensors", heads=12 if arch == "vit_small" else 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("arch", "heads"), [("vit_tiny", 3), ("vit_conv_small", 12), ("wide_resnet50_2", 0)])
def test_a_state_dict_shows_its_architecture(arch: str, heads: int, tmp_path: Path) -> None:
    save_file(backbone(arch), tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    assert (loaded.architecture.arch, loaded.architecture.heads) == (arch, heads)


def _without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(names)}


def _rotated(state: State) -> State:
    values = list(state.values())
    return dict(zip(state, values[1:] + values[:1], strict=True))


def _variances_exchanged(state: State) -> State:
    """Return a state with means instead of variances; the shapes stay."""
    swapped = {"bn1.running_var": state["bn1.running_mean"] - 1, "bn1.running_mean": state["bn1.running_var"]}
    return state | swapped


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: _without(s, "conv1."), "conv1.weight of the backbone is missing"),
        (lambda s: _without(s, "bn1."), r"bn1.weight, (encoder_q\.)?bn1.bias"),
        (lambda s: _without(s, "layer3.1.bn1.weight"), "layer3.1.bn1.weight"),
        (lambda s: _without(s, "layer4.1."), r"\[2, 2, 2, 1\] basic blocks"),
        (_rotated, "in disorder"),
        (_variances_exchanged, "bn1.running_var has negative variances"),
        (lambda s: s | {"bn1.weight": s["bn1.weight"] * torch.nan}, "bn1.weight has non-finite values"),
        (lambda s: {"weight": torch.zeros(3)}, "no backbone"),
    ],
    ids=["no stem", "no stem norm", "one key", "one block", "rotated", "exchanged", "nan", "other"],
)
def test_wrong_encoders_are_refused_with_the_key(spoil: Callable[[State], State], message: str, tmp_path: Path) -> None:
    for number, prefix in enumerate(("", "module.encoder_q.")):
        file = tmp_path / f"{number}.pth"
        torch.save({"state_dict": prefixed(spoil(backbone("resnet18")), prefix)}, file)
        with pytest.raises(InputError, match=message.replace("conv1.weight", ".*conv1.weight")) as raised:
            load_encoder(file)
        assert "\n" not in str(raised.value)


def test_a_classifiers_head_and_unknown_keys_are_warned_of(tmp_path: Path) -> None:
    torch.save(backbone("resnet18") | _linear("fc", 1000, 512), tmp_path / "x.pth")
    loaded = load_encoder(tmp_path / "x.pth")
    assert any("fc.weight [1000, 512], fc.bias [1000]" in warning for warning in loaded.warnings)
    torch.save(backbone("resnet18") | {"layer1.0.se.weight": torch.zeros(3)}, tmp_path / "x.pth")
    assert any("layer1.0.se.weight" in warning for warning in load_encoder(tmp_path / "x.pth").warnings)


def test_heads_of_a_small_transformer_must_be_given(tmp_path: Path) -> None:
    torch.save(backbone("vit_small"), tmp_path / "x.pth")
    with pytest.raises(InputError, match="--heads"):
        load_encoder(tmp_path / "x.pth")
    assert load_encoder(tmp_path / "x.pth", heads=6).architecture.heads == 6


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = {name: value for name, value in backbone("resnet18").items() if "num_batches" not in name}
    torch.save(state, tmp_path / "x.pth")
    assert load_encoder(tmp_path / "x.pth").matched == len(state)
