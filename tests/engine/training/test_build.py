"""What a run is built of, by its settings."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from engine.config.settings import Data, Method, Model, Optim, Settings
from engine.parallel import accelerator, collectives, rendezvous
from engine.training import build as building
from engine.training import loop
from engine.training.build import Run, build, check_batch
from engine.training.run_folder import check_out
from methods.norm import SplitBatchNorm
from methods.registry import Terms
from methods.residual import Residual
from pipeline.sampling.order import shuffled_rows
from pipeline.system.errors import InputError
from tests.gloo import on_ranks


def settings(beton: Path, bn: str, terms: Terms | None = None, **method: object) -> Settings:
    return Settings(
        data=Data(train=str(beton), size=16, batch=32, augmentation="moco_v2_32", workers=1),
        model=Model("resnet18", "small", 0.125, 16, bn=bn),  # type: ignore[arg-type]
        method=Method(queue_size=70, ema_momentum=0.9, **method),  # type: ignore[arg-type]
        terms=terms or Terms(),
        optim=Optim(lr=0.05, epochs=1),
        precision="no",
        tracker="none",
        cpu=True,
    )


def groups(run: Run) -> set[int]:
    return {m.groups for m in run.model.online.modules() if isinstance(m, SplitBatchNorm)}


@pytest.mark.parametrize(
    ("bn", "terms", "symmetric", "shuffled", "plain"),
    [
        ("plain", Terms(), False, set(), {0, 1}),
        ("sync", Terms(), False, set(), {0, 1}),
        ("shuffle", Terms(), False, {1}, {0}),
        ("split", Terms(), False, {1}, {0}),
        ("shuffle", Terms(residual=Residual()), False, {0, 1}, {0}),
        ("shuffle", Terms(), True, {0, 1}, {0, 1}),
    ],
)
def test_views_come_shuffled_where_batchnorm_asks_and_only_those_that_are_needed(
    bn: str, terms: Terms, symmetric: bool, shuffled: set[int], plain: set[int], drawn: Path
) -> None:
    run = build(settings(drawn, bn, terms, symmetric=symmetric))
    try:
        batch = next(iter(run.loader))
        assert set(batch.shuffled) == shuffled
        assert {index for index, view in enumerate(batch.views) if view is not None} == plain
        assert (batch.order is not None) == bool(shuffled)
        assert groups(run) == ({8} if shuffled else set())
    finally:
        run.loader.close()


def run_shuffled(beton: str, out: str, bn: str) -> None:
    """Train three steps; write the losses, the order of the last batch and the groups."""
    run = build(settings(Path(beton), bn))
    losses = []
    for _, batch in zip(range(3), run.loader, strict=False):
        losses.append(collectives.mean(run.model.step(batch).parts["loss"]).item())
    run.loader.close()
    torch.save(
        {"losses": losses, "order": torch.from_numpy(batch.order), "groups": sorted(groups(run))},
        Path(out) / f"{collectives.rank()}.pt",
    )


@pytest.mark.parametrize("bn", ["shuffle", "split"])
def test_two_processes_shuffle_over_both_or_within_each(bn: str, drawn: Path, tmp_path: Path) -> None:
    on_ranks(2, run_shuffled, str(drawn), str(tmp_path), bn)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["order"], second["order"])
    (tmp_path / "alone").mkdir()
    run_shuffled(str(drawn), str(tmp_path / "alone"), bn)
    alone = torch.load(tmp_path / "alone" / "0.pt", weights_only=True)
    if bn == "shuffle":  # eight parts of the global batch either way
        assert (first["groups"], alone["groups"]) == ([4], [8])
        assert first["order"].tolist() == alone["order"].tolist() == shuffled_rows(0, 2, 32).tolist()
        assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    else:
        assert (first["groups"], alone["groups"]) == ([8], [8])
        assert first["order"].tolist() == shuffled_rows(0, 2, 32, parts=2).tolist()
        assert np.ptp(first["order"][:16].numpy()) < 16


def test_views_grow_over_training_and_come_in_the_precision_of_the_encoder(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: True)
    chosen = settings(drawn, "plain")
    grown = replace(chosen.data, size=24, sizes=[8, 16, 24])
    run = build(replace(chosen, data=grown, optim=Optim(lr=0.05, epochs=5), precision="bf16"))
    found = []
    try:
        for _ in range(5):
            for batch in run.loader:
                result = run.model.step(batch)
                assert result.taken
            found.append((batch.views[0].shape[-1], batch.views[1].dtype))
    finally:
        run.loader.close()
    assert found == [(size, torch.bfloat16) for size in (8, 8, 16, 16, 24)]


def test_views_in_the_encoders_precision_give_the_same_step(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: True)
    found = []
    for cast in (True, False):
        run = build(replace(settings(drawn, "plain"), precision="bf16"))
        run.loader.dtype = torch.bfloat16 if cast else torch.float32
        batch = next(iter(run.loader))
        assert batch.views[0].dtype == run.loader.dtype
        found.append(run.model.step(batch).parts["loss"])
        run.loader.close()
    assert torch.equal(*found)


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_that_a_processor_would_emulate_is_float32(
    there: bool, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: there)
    run = build(replace(settings(drawn, "plain"), precision="bf16"))
    run.close()
    assert run.accelerator.mixed_precision == ("bf16" if there else "no")
    assert run.loader.dtype == (torch.bfloat16 if there else torch.float32)
    assert run.settings.precision == "bf16"
    says = "warning: precision bf16: this processor has no instructions for it: computing in float32, as precision no\n"
    assert (says in capsys.readouterr().err) != there


def test_what_is_refused_is_not_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: False)
    with pytest.raises(InputError, match="no such file"):
        build(replace(settings(Path("nowhere.beton"), "plain"), precision="bf16"))
    assert not capsys.readouterr().err


def test_settings_reach_the_networks(drawn: Path) -> None:
    chosen = settings(drawn, "plain")
    chosen = replace(
        chosen,
        model=replace(chosen.model, zero_init_residual=True),
        method=replace(chosen.method, queue_dtype="bfloat16"),
    )
    run = build(chosen)
    run.loader.close()
    assert run.model.queue is not None
    assert run.model.queue.keys.dtype == torch.bfloat16
    assert run.backbone.layer1[0].bn2.weight.abs().sum() == 0
    vit = replace(
        chosen,
        data=replace(chosen.data, size=32),
        model=Model("vit_small", dim=16, stop_grad_conv1=False),
        method=replace(chosen.method, queue_dtype="float32"),
    )
    run = build(vit)
    run.loader.close()
    assert all(p.requires_grad for p in run.backbone.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in run.backbone.modules())


@pytest.mark.parametrize(
    ("batch", "bn", "warned"),
    [(64, "shuffle", False), (40, "shuffle", False), (42, "shuffle", True), (42, "plain", False)],
)
def test_a_batch_that_batchnorms_parts_do_not_divide_is_warned_of(
    batch: int, bn: str, warned: bool, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(drawn, bn)
    check_batch(replace(chosen, data=replace(chosen.data, batch=batch)), Accelerator(cpu=True))
    assert ("does not divide into the 8 parts" in capsys.readouterr().err) == warned


def test_parts_of_a_single_sample_are_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match="gradient_accumulation_steps 32"):
        check_batch(replace(settings(drawn, "plain"), gradient_accumulation_steps=32), Accelerator(cpu=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "fp16"}, "precision 'fp16': needs a GPU"),
    "parts": ({"gradient_accumulation_steps": 32}, "gradient_accumulation_steps 32: does not divide"),
    "batch": ({"data.batch": 201}, "a batch of 201 from 200 samples"),
    "a file": ({"out": "{file}/run"}, "out '{file}/run': Not a directory: choose another folder"),
    "a run": ({"out": "{run}"}, "already holds a run: add --resume auto"),
    "in use": ({"out": "{used}", "resume": "auto"}, "another run is writing into it"),
}


def wrong(case: str, beton: Path, places: dict[str, str]) -> Settings:
    """Settings of a run that cannot work, whose data are to be verified."""
    chosen = settings(beton, "plain")
    changed = {key: v.format(**places) if isinstance(v, str) else v for key, v in WRONG[case][0].items()}
    data = {key.removeprefix("data."): changed.pop(key) for key in list(changed) if key.startswith("data.")}
    return replace(chosen, data=replace(chosen.data, verify="full", **data), **changed)


def not_to_be_called(*_: object) -> None:
    raise AssertionError("verified")


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_launch_is_refused_before_the_data_are_verified(
    case: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: str(tmp_path / name) for name in ("file", "run", "used")}
    (tmp_path / "file").touch()
    (tmp_path / "run" / "checkpoints" / "step_4").mkdir(parents=True)
    (tmp_path / "used").mkdir()
    monkeypatch.setattr(building, "verify_sets", not_to_be_called)
    chosen, says = wrong(case, drawn, places), WRONG[case][1].format(**places)
    with open(tmp_path / "used" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=says):
            loop.train(chosen)


def test_a_folder_that_cannot_be_written_is_refused(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = replace(settings(drawn, "plain"), out=str(tmp_path / "new" / "run"))
    check_out(chosen)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=r"new/run': Permission denied: choose another folder"):
        check_out(chosen)


def launch_wrongly(beton: str, out: str) -> None:
    """Two processes, each wrong launch in turn: one without a GPU, as it is told, one that cannot write."""
    building.verify_sets = not_to_be_called
    chosen = settings(Path(beton), "plain")
    chosen = replace(chosen, data=replace(chosen.data, verify="full"), out=f"{out}/new")
    odd = replace(chosen, data=replace(chosen.data, batch=31))
    told = []
    for each in (replace(chosen, precision="fp16"), replace(chosen, out=f"{out}/file/run"), odd):
        with pytest.raises(InputError) as raised:
            loop.train(each)
        told.append(str(raised.value))
    Path(out, f"{collectives.rank()}.json").write_text(json.dumps(told))


def test_wrong_launches_of_two_processes_are_refused_on_both_before_the_data_are_verified(
    drawn: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    on_ranks(2, launch_wrongly, str(drawn), str(tmp_path))
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert [told.partition(":")[0].split(" ")[0] for told in one] == ["precision", "process", "data.batch"], one


def find_a_gpu_short(beton: str, out: str) -> None:
    """Two processes on a machine that is said to have one GPU."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_bf16_supported = lambda **_: True
    with pytest.raises(InputError) as raised:
        build(replace(settings(Path(beton), "plain"), cpu=False))
    Path(out, f"{rendezvous.rank()}.txt").write_text(str(raised.value))


def test_a_process_without_a_gpu_is_named_on_all(drawn: Path, tmp_path: Path) -> None:
    on_ranks(2, find_a_gpu_short, str(drawn), str(tmp_path))
    host = platform.node()
    says = f"process 1 on {host}: 1 GPUs on {host} for 2 processes or more: start one process a GPU"
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [says, says]


def test_a_gpu_that_emulates_bfloat16_is_refused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a V100 or T4, of which torch says by default that it is supported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(InputError, match=r"precision 'bf16': this GPU does not have it: choose fp16 or no"):
        accelerator._checked(Settings(), emulate=False)
    assert accelerator._checked(Settings(precision="fp16"), emulate=False) == (True, "fp16")


@pytest.mark.parametrize(
    ("width", "sizes", "arch", "warned"),
    [
        (0.125, [64], "resnet18", True),
        (0.25, [64], "resnet18", False),
        (0.125, [48], "resnet18", False),
        (0.125, [64, 32], "resnet18", True),
        (1.0, [64], "vit_small", False),
    ],
)
def test_few_channels_are_warned_of_on_a_cpu(
    width: float, sizes: list[int], arch: Any, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = Settings(model=Model(arch=arch, width=width), data=Data(size=sizes[-1]))
    chosen.data.sizes = sizes
    building._warn_of_few_channels(chosen, Accelerator(cpu=True))
    assert ("choose 0.25 or more" in capsys.readouterr().err) == warned


def find_a_gpu_on_one(beton: str, out: str) -> None:
    """Two machines, the second without a GPU."""
    there = int(rendezvous.rank() == 0)
    os.environ["LOCAL_RANK"] = "0"
    torch.cuda.is_available = lambda: bool(there)
    torch.cuda.device_count = lambda: there
    with pytest.raises(InputError) as raised:
        build(replace(settings(Path(beton), "plain"), cpu=False))
    Path(out, f"{rendezvous.rank()}.txt").write_text(str(raised.value))


def test_a_machine_without_a_gpu_is_named_on_all(drawn: Path, tmp_path: Path) -> None:
    on_ranks(2, find_a_gpu_on_one, str(drawn), str(tmp_path))
    host = platform.node()
    says = f"device: process 0 on {host} has 'GPU', process 1 on {host} 'CPU': give all processes the same"
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [says, says]
