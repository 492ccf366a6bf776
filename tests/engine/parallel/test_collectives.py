"""Several ranks against one process with the same global batch, in float64: losses, gradients, statistics, queue."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock

from engine.config.settings import Settings
from engine.parallel import collectives
from engine.parallel.accelerator import build_accelerator
from engine.training.model import needed_views
from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import BASES, Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.loader import Batch
from pipeline.sampling.order import shuffled_rows
from tests.conftest import Figure
from tests.engine.small import batch_of, built, settings, views
from tests.gloo import on_ranks

STEPS = 2
TERMS = {
    "co2": Terms(co2=CO2()),
    "cross mse": Terms(xmoco=XMoCo(uniformity=0)),
    "cross kl": Terms(xmoco=XMoCo(uniformity=0, form="kl")),
    "uniformity": Terms(xmoco=XMoCo(cross=0)),
    "residual": Terms(residual=Residual()),
    "dcl": Terms(dcl=DCL()),
    "all": Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual(), dcl=DCL()),
}
FOUR = ["moco_v2 + all", "moco_v3 + all", "simclr + co2, xmoco", "byol + co2, xmoco, residual", "moco_v2, shuffle"]
CANNOT = {"simclr": {"residual", "all"}, "byol": {"dcl", "all"}}


def cases() -> dict[str, Settings]:
    """Return settings by name: each base alone and with each of its terms, BatchNorm synchronized; and other kinds."""
    found = {}
    for name in ("moco_v1", "moco_v2", "moco_v3", "simclr", "byol"):
        found[name] = settings(name, bn="sync")
        for term, terms in TERMS.items():
            if term not in CANNOT.get(name, ()):
                found[f"{name} + {term}"] = settings(name, terms, bn="sync")
    several = Terms(co2=CO2(), xmoco=XMoCo())
    found["simclr + co2, xmoco"] = settings("simclr", several, bn="sync")
    found["byol + co2, xmoco, residual"] = settings("byol", replace(several, residual=Residual()), bn="sync")
    found["moco_v2, symmetric + all"] = settings("moco_v2", TERMS["all"], bn="sync", symmetric=True)
    found["moco_v2, shuffle"] = settings("moco_v2", bn="shuffle", batch=32)
    found["moco_v2, symmetric, shuffle + all"] = settings(
        "moco_v2", TERMS["all"], bn="shuffle", batch=32, symmetric=True
    )
    found["moco_v3, shuffle"] = settings("moco_v3", bn="shuffle", batch=32)
    found["moco_v3 + all but cross, accumulated"] = replace(
        settings("moco_v3", replace(TERMS["all"], xmoco=XMoCo(cross=0)), bn="plain"), gradient_accumulation_steps=2
    )
    found["moco_v3, clipped"] = settings("moco_v3", bn="sync")
    found["moco_v3, clipped"].optim.clip_grad_norm = 0.1
    return found


def rank_batch(chosen: Settings, step: int) -> Batch:
    """Return this rank's share of a global batch, as the loader would hand it out."""
    batch = chosen.data.batch
    given = [view.chunk(collectives.world())[collectives.rank()] for view in views(step, batch)]
    if chosen.model.bn != "shuffle":
        return batch_of(*given)
    order = shuffled_rows(0, step, batch)
    shuffled = {index: collectives.exchange(given[index], order) for index in needed_views(chosen, "kK")}
    return batch_of(*given, shuffled=shuffled, order=order)


def trained(chosen: Settings, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Train a few steps; return losses, gradients, buffers and queue by name."""
    model = built(chosen, accelerator)
    encoder, found = model.step.encoder, {}
    if chosen.gradient_accumulation_steps > 1:  # batch statistics would be those of other parts
        encoder.eval()
        model.target.eval()

    def record(*_: Any) -> None:
        for name, p in encoder.named_parameters():
            if p.grad is not None:
                found[f"gradient {step} {name}"] = p.grad.clone()

    model.optimizer.optimizer.register_step_pre_hook(record)
    for step in range(STEPS):
        parts = model.step(rank_batch(chosen, step)).parts
        found |= {f"part {step} {name}": collectives.mean(value) for name, value in parts.items()}
    found |= {f"parameter {name}": p.detach().clone() for name, p in encoder.named_parameters()}
    if model.target is not None:
        found |= {f"momentum {name}": p.clone() for name, p in model.target.named_parameters()}
    if chosen.model.bn == "sync":
        found |= {f"buffer {name}": b.double().clone() for name, b in encoder.named_buffers()}
    if model.queue is not None:
        found |= {"queue": model.queue.keys.clone(), "position": model.queue.position}
    return found


def run_cases(names: list[str], out: str) -> None:
    """Train cases on this rank; write what came of them."""
    accelerator = Accelerator(cpu=True)
    assert collectives.world() == accelerator.num_processes > 1
    results = {name: trained(chosen, accelerator) for name, chosen in cases().items() if name in names}
    torch.save(results, Path(out) / f"{collectives.rank()}.pt")


@functools.cache
def alone(name: str) -> dict[str, torch.Tensor]:
    return trained(cases()[name], Accelerator(cpu=True))


def trained_on(world: int, names: list[str], factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Train on so many ranks; return what each came to. The first of pytest's workers to ask trains, for all."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    folder = (factory.getbasetemp() if alone else factory.getbasetemp().parent) / f"ranks{world}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = factory.mktemp("ranks")
            on_ranks(world, run_cases, names, str(made))
            made.rename(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    mine = (item for item in request.session.items if item.module is request.module)  # type: ignore[attr-defined]
    asked = [item.callspec.params["name"] for item in mine if item.originalname == "test_two_ranks_equal_one_process"]  # type: ignore[attr-defined]
    return trained_on(2, asked, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trained_on(4, FOUR, tmp_path_factory)


def is_slow(name: str) -> bool:
    """Return whether a case is a term alone on a base that is much like another's, or has other cases of several."""
    base, _, terms = name.partition(" + ")
    return base in ("moco_v1", "simclr", "byol") and terms in TERMS.keys() - {"all"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if is_slow(name) else []) for name in cases()]
)
def test_two_ranks_equal_one_process(name: str, two: list[dict[str, Any]]) -> None:
    check(name, alone(name), two)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(name: str, four: list[dict[str, Any]]) -> None:
    check(name, alone(name), four)


def check(name: str, expected: dict[str, torch.Tensor], together: list[dict[str, Any]]) -> None:
    """Compare what each rank came to with one process. Of BatchNorm over two samples gradients are large."""
    assert any(key.startswith("gradient") and value.abs().max() > 1e-3 for key, value in expected.items())
    for rank in together:
        assert rank[name].keys() == expected.keys()
        for key, value in expected.items():
            scale = max(1.0, value.abs().max().item()) if "shuffle" in name else 1.0
            assert torch.allclose(rank[name][key], value, atol=1e-9 * scale, rtol=0), key
    assert all(torch.equal(rank[name][key], together[0][name][key]) for rank in together for key in expected)


def twenty() -> dict[str, Settings]:
    """Each base, alone and with all terms it can carry, with steps small enough that rounding does not grow."""
    carried = dict.fromkeys(BASES, TERMS["all"])
    carried |= {"simclr": Terms(co2=CO2(), xmoco=XMoCo(), dcl=DCL())}
    carried |= {"byol": Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual())}
    found = {name: settings(name, bn="sync") for name in BASES}
    found |= {f"{name} + terms": settings(name, carried[name], bn="sync") for name in BASES}
    return {name: replace(case, optim=replace(case.optim, lr=0.001)) for name, case in found.items()}


def run_twenty(out: str) -> None:
    """Train with BatchNorm synchronized, and with none: in evaluation mode it is an affine layer."""
    accelerator, results = Accelerator(cpu=True), {}
    for name, chosen in twenty().items():
        for normalized in (True, False):
            model = built(chosen, accelerator)
            for module in (model.step.encoder, model.target):
                if module is not None:
                    module.train(normalized)
            losses = [collectives.mean(model.step(rank_batch(chosen, step)).parts["loss"]) for step in range(20)]
            queue = model.queue.keys if model.queue else torch.empty(0)
            case = name if normalized else f"{name}, no BatchNorm"
            results[case] = {"losses": torch.stack(losses), "queue": queue}
    torch.save(results, Path(out) / f"{collectives.world()} {collectives.rank()}.pt")


@pytest.mark.slow
def test_twenty_steps_on_one_two_and_four_ranks(tmp_path: Path) -> None:
    for world in (1, 2, 4):
        on_ranks(world, run_twenty, str(tmp_path))
    alone, *others = (
        torch.load(tmp_path / f"{world} {rank}.pt", weights_only=True) for world in (1, 2, 4) for rank in range(world)
    )
    assert len(alone) == 2 * len(twenty())
    largest = 0.0
    for name, expected in alone.items():
        assert expected["losses"].std() > 0, name
        for found in (other[name] for other in others):
            largest = max(largest, (found["losses"] - expected["losses"]).abs().max().item())
            assert torch.allclose(found["losses"], expected["losses"], atol=1e-9, rtol=0), name
            assert torch.allclose(found["queue"], expected["queue"], atol=1e-9, rtol=0), name
        assert all(torch.equal(found[name]["queue"], others[0][name]["queue"]) for found in others[:2])
        assert all(torch.equal(found[name]["queue"], others[2][name]["queue"]) for found in others[2:])
    print(f"{len(alone)} cases: losses differ by {largest:.1e} at most")


def run_collectives(out: str) -> None:
    Accelerator(cpu=True)
    world, rank, count = collectives.world(), collectives.rank(), 6
    everyone = torch.arange(world * count * 2).view(-1, 2).to(torch.uint8)
    own = everyone.chunk(world)[rank]
    found = {"gather": collectives.gather(own)}
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(world * count)
        found[f"exchange {seed}"] = collectives.exchange(own, order)
        assert torch.equal(found[f"exchange {seed}"], everyone[order].chunk(world)[rank])
    within = shuffled_rows(0, 0, world * count, parts=world)
    assert torch.equal(collectives.exchange(own, within), everyone[within].chunk(world)[rank])
    assert torch.equal(found["gather"], everyone)
    later, sooner = collectives.gather_later(own), collectives.gather_later(2 * own)
    assert torch.equal(sooner(), 2 * everyone)
    assert torch.equal(later(), everyone)
    Path(out, str(rank)).touch()


def test_rows_are_gathered_and_exchanged(tmp_path: Path) -> None:
    on_ranks(3, run_collectives, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def run_poisoned(out: str) -> None:
    """Train; one rank's batch is not finite in one step."""
    accelerator = Accelerator(cpu=True)
    for name in ("moco_v2", "moco_v3", "simclr", "byol"):
        chosen = settings(name, bn="sync" if name == "moco_v3" else "plain")
        ends = []
        for poisoned in (True, False):
            model = built(chosen, accelerator)
            modules = [m for m in (model.step.encoder, model.target, model.queue, model.step.schedule) if m is not None]
            for step in range(3):
                if poisoned and step == 1:
                    before = [value.clone() for module in modules for value in module.state_dict().values()]
                    bad = rank_batch(chosen, 9)
                    if collectives.rank() == 1:
                        bad = replace(bad, views=(bad.views[0] * torch.inf, bad.views[1]))
                    result = model.step(bad)
                    assert result.parts["loss"].isfinite() == (collectives.rank() == 0 and name in ("moco_v2", "byol"))
                    assert not result.taken
                    model.step.schedule.skipped.zero_()
                    after = [value for module in modules for value in module.state_dict().values()]
                    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                model.step(rank_batch(chosen, step))
            ends.append([value.clone() for module in modules for value in module.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    Path(out, str(collectives.rank())).touch()


@pytest.mark.reliability
def test_a_batch_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path: Path, figure: Figure) -> None:
    on_ranks(2, run_poisoned, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    says = "4 base methods: parameters, momentum, queue, position, schedules bit-equal, and the run's end"
    figure("NaN on one rank in one step", says)


def run_compressed(out: str) -> None:
    """Compare the gradients that two ways of exchanging them give, in buckets and in parts."""
    for accumulate in (1, 2):
        chosen, found = replace(settings(), gradient_accumulation_steps=accumulate, cpu=True, tracker="none"), []
        for dtype in ("float32", "bfloat16"):
            exchanged = replace(chosen, gradient_dtype=dtype)  # type: ignore[arg-type]
            model = built(exchanged, build_accelerator(exchanged))
            assert model.online.static_graph == (accumulate == 1)
            gradients: list[torch.Tensor] = []
            model.optimizer.optimizer.register_step_pre_hook(
                lambda *_, model=model, gradients=gradients: gradients.append(
                    torch.cat([p.grad.flatten() for p in model.online.parameters()])
                )
            )
            model.step(rank_batch(chosen, 0))
            found.append(gradients[0])
        full, half = found
        assert torch.equal(half, half.bfloat16().double())
        assert not torch.equal(full, half)
        assert ((half - full).abs() <= 2**-7 * full.abs() + 2**-7 * full.abs().mean()).float().mean() > 0.97
        assert torch.nn.functional.cosine_similarity(full, half, dim=0) > 0.9999
    Path(out, str(collectives.rank())).touch()


def test_gradients_exchanged_in_bfloat16_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    on_ranks(2, run_compressed, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
