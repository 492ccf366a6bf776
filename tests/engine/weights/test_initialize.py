"""Runs that start from a file's weights: both encoders have them, heads on request, other backbones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import storage
from engine.config.setting_error import SettingError
from engine.config.settings import Settings
from engine.parallel.rendezvous import rank
from engine.training.build import Run, build
from engine.training.resume import restore, save
from engine.weights.key_maps import to_library
from methods.heads import moco_v2_head
from methods.norm import norm_layers
from methods.registry import build_backbone
from pipeline.system.errors import InputError
from tests.engine.training import runs
from tests.engine.weights.conftest import State, prefixed
from tests.gloo import on_ranks


def _backbone(seed: int) -> State:
    """Return weights and statistics that no run begins with."""
    torch.manual_seed(seed)
    state = build_backbone("resnet18", stem="small", width=0.125).state_dict()
    return {name: value + 0.5 if "running" in name else value for name, value in state.items()}


def _head(seed: int) -> State:
    torch.manual_seed(seed)
    projector, _ = moco_v2_head(64, None, 16, norm_layers("plain", 1), False)
    return projector.state_dict()


def _moco(online: State, momentum: State) -> State:
    state = prefixed(online, "module.encoder_q.") | prefixed(momentum, "module.encoder_k.")
    return state | prefixed(_head(5), "module.encoder_q.fc.") | prefixed(_head(6), "module.encoder_k.fc.")


def _moco_v3(online: State, momentum: State) -> State:
    return prefixed(online, "module.base_encoder.") | prefixed(momentum, "module.momentum_encoder.")


LAYOUTS: dict[str, Callable[[State, State], State]] = {
    "MoCo v2": _moco,
    "MoCo v3": _moco_v3,
    "SimSiam": lambda online, _: prefixed(online, "module.encoder."),
    "torchvision and timm": lambda online, _: online,
    "detectron2": lambda online, _: to_library(online, "detectron2", transformer=False),
    "another": lambda online, _: prefixed(online, "learner.net.") | {"learner.other": torch.zeros(2)},
}


def _settings(beton: Path, out: Path, **model: Any) -> Settings:
    chosen = runs.settings(beton, "plain")
    return replace(chosen, out=str(out), model=replace(chosen.model, **model))


def _started(settings: Settings) -> Run:
    run = build(settings)
    try:
        restore(run)
    finally:
        run.close()
    return run


def _equal(module: torch.nn.Module, state: State) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


def _first_loss(run: Run) -> float:
    return float(run.model.step(next(iter(run.loader))).parts["loss"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["online", "momentum"])
def test_both_encoders_and_the_first_loss_are_those_of_weights_loaded_by_hand(
    layout: str, which: str, drawn: Path, tmp_path: Path
) -> None:
    if which == "momentum" and "MoCo" not in layout:
        pytest.skip("one encoder")
    file, parts = tmp_path / "x.pth", {"online": _backbone(1), "momentum": _backbone(2)}
    torch.save({"state_dict": LAYOUTS[layout](parts["online"], parts["momentum"])}, file)
    prefix = "learner.net" if layout == "another" else ""
    run = build(_settings(drawn, tmp_path / "run", init=str(file), init_which=which, init_prefix=prefix))
    restore(run)
    by_hand = build(_settings(drawn, tmp_path / "other"))
    for encoder in (by_hand.model.step.encoder, by_hand.model.target):
        assert encoder is not None
        encoder.backbone.load_state_dict(parts[which])
    assert run.model.target is not None
    assert by_hand.model.target is not None
    assert _equal(run.backbone, parts[which])
    assert _equal(run.model.target.backbone, parts[which])
    assert _equal(run.model.step.encoder.projector, by_hand.model.step.encoder.projector.state_dict())
    assert not any(buffers["momentum_buffer"].any() for buffers in run.model.optimizer.state.values())
    assert _first_loss(run) == _first_loss(by_hand)
    run.close()
    by_hand.close()


def test_a_run_of_ours_gives_its_heads_on_request(drawn: Path, tmp_path: Path) -> None:
    first = build(_settings(drawn, tmp_path / "first"))
    restore(first)
    first.model.step(next(iter(first.loader)))
    first.done = 1
    save(first)
    first.close()
    run = _started(_settings(drawn, tmp_path / "second", init=str(tmp_path / "first"), init_heads=True))
    assert _equal(run.model.step.encoder, first.model.step.encoder.state_dict())
    assert run.model.target is not None
    assert _equal(run.model.target, first.model.step.encoder.state_dict())
    assert run.started_from["heads"] == ["projector"]


@pytest.mark.parametrize(("which", "seed"), [("online", 5), ("momentum", 6)])
def test_official_heads_of_the_same_shapes_are_loaded(which: str, seed: int, drawn: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": _moco(_backbone(1), _backbone(2))}, tmp_path / "x.pth")
    own = {"init": str(tmp_path / "x.pth"), "init_which": which, "init_heads": True}
    run = _started(_settings(drawn, tmp_path / "run", **own))
    assert _equal(run.model.step.encoder.projector, _head(seed))


@pytest.mark.parametrize(
    ("changed", "content", "message"),
    [
        ({"width": 0.25}, _backbone(1), r"has resnet18 \(width 0.125, small stem\).*choose model.width 0.125"),
        ({"arch": "resnet34"}, _backbone(1), "choose model.arch resnet18"),
        ({}, {k: v for k, v in _backbone(1).items() if "layer3.0.conv2" not in k}, "layer3.0.conv2.weight"),
        ({"init_which": "momentum"}, _backbone(1), "of one encoder: choose the online one"),
        ({"init_heads": True}, _backbone(1), "has no projector: leave model.init_heads out"),
        (
            {"init_heads": True, "dim": 8},
            _moco(_backbone(1), _backbone(2)),
            r"another projector: 2.weight is \[16, 64\]",
        ),
        ({}, prefixed(_backbone(1), "student.net."), "prefixes of such keys: student.net."),
        ({"init_prefix": "wrong."}, _backbone(1), "no backbone .* under wrong."),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_remedy(
    changed: dict[str, Any], content: State, message: str, drawn: Path, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "x.pth")
    run = build(_settings(drawn, tmp_path / "run", init=str(tmp_path / "x.pth"), **changed))
    with pytest.raises(InputError, match=message) as raised:
        restore(run)
    run.close()
    assert str(raised.value).startswith("model.init")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_wrong_path_is_found_before_the_data_is_read(drawn: Path, tmp_path: Path) -> None:
    chosen = _settings(tmp_path / "gone.beton", tmp_path / "run", init=str(tmp_path / "x.pth"))
    with pytest.raises(InputError, match=r"model.init .*x.pth: no such file or folder"):
        build(chosen)


def test_settings_of_a_file_need_one(drawn: Path) -> None:
    for key, value in (("init_heads", True), ("init_which", "momentum"), ("init_prefix", "x.")):
        with pytest.raises(SettingError, match=f"model.{key}.*model.init names no file"):
            _settings(drawn, Path("out"), **{key: value})


def test_narrow_networks_are_compared_by_their_channels(drawn: Path, tmp_path: Path) -> None:
    """A state dict shows 9 channels, and not that their width is 0.145 of 64, rounded."""
    state = build_backbone("resnet18", stem="small", width=0.145).state_dict()
    torch.save(state, tmp_path / "x.pth")
    run = _started(_settings(drawn, tmp_path / "run", init=str(tmp_path / "x.pth"), width=0.145))
    assert _equal(run.backbone, state)


def test_a_resume_needs_no_file_and_keeps_the_record(drawn: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(_backbone(1), file)
    chosen = _settings(drawn, tmp_path / "run", init=str(file))
    run = build(chosen)
    restore(run)
    run.model.step(next(iter(run.loader)))
    run.done = 1
    save(run)
    run.close()
    file.unlink()
    resumed = _started(replace(chosen, resume="auto"))
    assert _equal(resumed.model.step.encoder, run.model.step.encoder.state_dict())
    assert resumed.started_from == run.started_from
    assert resumed.started_from["matched"] == len(_backbone(1))
    state = json.loads((storage.last(tmp_path / "run" / "checkpoints") / "state.json").read_text())  # type: ignore[operator]
    assert str(state).count(str(file)) == 2  # in the settings and in the record
    with pytest.raises(InputError, match=r"model\.init '': the checkpoint has '.*x.safetensors'"):
        _started(replace(chosen, resume="auto", model=replace(chosen.model, init="")))


def test_all_ranks_start_from_rank_0s_file(drawn: Path, tmp_path: Path) -> None:
    save_file(_backbone(1), tmp_path / "rank0.safetensors")
    on_ranks(2, _start_on_rank, str(drawn), str(tmp_path))


def _start_on_rank(drawn: str, folder: str) -> None:
    settings = _settings(Path(drawn), Path(folder, "run"), init=f"{folder}/rank0.safetensors")
    run = build(settings)
    if rank():
        run.backbone.conv1.weight.data.zero_()
    restore(run)
    assert run.model.target is not None
    assert _equal(run.backbone, _backbone(1))
    assert _equal(run.model.target.backbone, _backbone(1))
    run.close()
