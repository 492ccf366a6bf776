"""Every base method with every set of terms it supports trains, and resumes exactly from a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.settings import Data, Method, Model, Optim, Settings
from engine.training.build import Run, build
from engine.training.resume import modules, restore, save
from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import BASES, Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.system.errors import InputError

TERMS: dict[str, Any] = {"co2": CO2(), "xmoco": XMoCo(), "residual": Residual(), "dcl": DCL()}
CANNOT = {"simclr": "residual", "byol": "dcl"}
SUBSETS = list(chain(*(combinations(TERMS, count) for count in range(len(TERMS) + 1))))
CARRIED = [(base, subset) for base in BASES for subset in SUBSETS if CANNOT.get(base) not in subset]


def settings(base: str, subset: tuple[str, ...], beton: Path, out: Path) -> Settings:
    """Return settings of a small run; the bases have various optimizers."""
    queue = {"queue_size": 35} if BASES[base].queue else {}
    optimizer = {"moco_v1": "sgd", "moco_v2": "sgd", "moco_v3": "lars", "simclr": "adamw", "byol": "lars"}[base]
    return Settings(
        data=Data(train=str(beton), size=16, batch=20, augmentation="moco_v2_32", workers=1),
        model=Model("resnet18", "small", 0.125, 16, None if base == "moco_v1" else 24),
        method=Method(name=base, ema_momentum=0.9 if BASES[base].momentum_encoder else None, **queue),  # type: ignore[arg-type]
        terms=Terms(**{name: TERMS[name] for name in subset}),
        optim=Optim(name=optimizer, lr=0.01, warmup_epochs=0, epochs=2),  # type: ignore[arg-type]
        out=str(out),
        precision="no",
        tracker="none",
        cpu=True,
    )


def state(run: Run) -> dict[str, torch.Tensor]:
    tensors = {name: value.clone() for name, value in modules(run).state_dict().items()}
    for name, p in run.model.online.named_parameters():
        tensors |= {f"{name} {key}": value.clone() for key, value in run.model.optimizer.state.get(p, {}).items()}
    return tensors


def train(run: Run, steps: int) -> list[dict[str, float]]:
    parts = []
    for _, batch in zip(range(steps), run.loader, strict=False):
        parts.append({name: value.item() for name, value in run.model.step(batch).parts.items()})
        run.done += 1
    return parts


def test_every_term_is_among_the_subsets() -> None:
    assert [field.name for field in fields(Terms)] == list(TERMS)


def marked(base: str, subset: tuple[str, ...]) -> Any:
    """Return a case: none, each one and all of the base's terms, or other subsets, which are slow tests."""
    slow = 1 < len(subset) < len(TERMS) - (base in CANNOT)
    return pytest.param(
        base, subset, marks=[pytest.mark.slow] if slow else [], id=f"{base}-{'+'.join(subset) or 'alone'}"
    )


@pytest.mark.parametrize(("base", "subset"), [marked(*case) for case in CARRIED])
def test_trains_and_resumes_from_a_checkpoint(base: str, subset: tuple[str, ...], drawn: Path, tmp_path: Path) -> None:
    chosen = settings(base, subset, drawn, tmp_path / "out")
    run, again = build(chosen), None
    try:
        matrices = {name: p for name, p in run.model.online.named_parameters() if p.ndim > 1}
        before = {name: p.detach().clone() for name, p in matrices.items()}
        parts = train(run, 3)
        names = {"loss", *(name.split("_")[0] for name in ({*subset} if "dcl" in subset else {*subset, "base"}))}
        logged = {"base" if name in ("info_nce", "regression") else name.split("_")[0] for name in parts[0]}
        assert logged == names
        assert all(torch.tensor(list(step.values())).isfinite().all() for step in parts)
        assert not any(torch.equal(p, before[name]) for name, p in matrices.items())
        save(run)
        run.writer.finish()
        again = build(replace(chosen, resume="auto"))
        restore(again)
        first, second = state(run), state(again)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        if run.model.queue is not None:
            assert run.model.queue.position.item() == again.model.queue.position.item() == 60 % 35
        assert train(run, 1) == train(again, 1)
    finally:
        run.close()
        if again is not None:
            again.close()


@pytest.mark.parametrize(("base", "term"), CANNOT.items())
def test_incompatible_term_is_refused_with_the_reason(base: str, term: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"terms.{term}: {base} has no .*leave the term out"):
        settings(base, (term,), tmp_path, tmp_path)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_settings_of_every_combination_are_written_and_read(every: int, tmp_path: Path) -> None:
    from engine.config.cli import parse

    for base, subset in CARRIED[::every]:
        chosen = settings(base, subset, tmp_path / "x.beton", tmp_path)
        chosen.write(tmp_path / "config.yaml")
        assert asdict(parse(["--config", str(tmp_path / "config.yaml")])) == asdict(chosen)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [{"precision": "bf16"}, {"precision": "fp16"}, {"precision": "bf16", "gradient_accumulation_steps": 2}]
)
@pytest.mark.parametrize("base", BASES)
def test_step_on_the_gpu_never_synchronizes(base: str, more: dict[str, Any], drawn: Path, tmp_path: Path) -> None:
    """Each base with its optimizer and all its terms; those with queries of all ranks do not accumulate."""
    alone = {"xmoco", "dcl"} if "gradient_accumulation_steps" in more else set[str]()
    if alone and base == "simclr":
        pytest.skip("refused: SimCLR's queries serve as keys")
    subset = tuple(term for term in TERMS if CANNOT.get(base) != term and term not in alone)
    run = build(replace(settings(base, subset, drawn, tmp_path), cpu=False, **more))
    try:
        train(run, 1)
        batch = next(iter(run.loader))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        result = run.model.step(batch)
        run.monitor.add(result, 20, 0.0)
        torch.cuda.set_sync_debug_mode("default")
        assert all(value.isfinite() for value in result.parts.values())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.close()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["resident", "ffcv", "dali"])
def test_graph_is_recorded_while_the_loader_works(
    backend: str, precision: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its threads allocate, copy and launch kernels: the losses are those of a plain step."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    losses = []
    for graph in (False, True):
        chosen = replace(settings("moco_v2", ("co2",), drawn, tmp_path), cpu=False, precision=precision)
        run = build(replace(chosen, cuda_graph=graph, data=replace(chosen.data, backend=backend)))
        try:
            losses.append([step["loss"] for step in train(run, 10)])
        finally:
            run.close()
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert "cuda_graph" not in capsys.readouterr().err
