"""Several ranks against one process with the same global batch, in float64: losses, gradients, statistics, queue."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from engine.config.settings import Settings
from engine.parallel import collectives
from engine.parallel.accelerator import build_accelerator
from engine.parallel.rendezvous import rank, world
from engine.training.model import needed_views
from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import BASES, Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.loader import Batch
from pipeline.sampling.order import shuffled_rows
from tests.conftest import Figure, made_once
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
    """Return settings by name: each base alone and with each of its terms, BatchNorm synchronized; and others."""
    chosen = {}
    for name in ("moco_v1", "moco_v2", "moco_v3", "simclr", "byol"):
        chosen[name] = settings(name, bn="sync")
        for term, terms in TERMS.items():
            if term not in CANNOT.get(name, ()):
                chosen[f"{name} + {term}"] = settings(name, terms, bn="sync")
    several = Terms(co2=CO2(), xmoco=XMoCo())
    chosen["simclr + co2, xmoco"] = settings("simclr", several, bn="sync")
    chosen["byol + co2, xmoco, residual"] = settings("byol", replace(several, residual=Residual()), bn="sync")
    chosen["moco_v2, symmetric + all"] = settings("moco_v2", TERMS["all"], bn="sync", symmetric=True)
    chosen["moco_v2, shuffle"] = settings("moco_v2", bn="shuffle", batch=32)
    chosen["moco_v2, symmetric, shuffle + all"] = settings(
        "moco_v2", TERMS["all"], bn="shuffle", batch=32, symmetric=True
    )
    chosen["moco_v3, shuffle"] = settings("moco_v3", bn="shuffle", batch=32)
    chosen["moco_v3 + all but cross, accumulated"] = replace(
        settings("moco_v3", replace(TERMS["all"], xmoco=XMoCo(cross=0)), bn="plain"), gradient_accumulation_steps=2
    )
    chosen["moco_v3, clipped"] = settings("moco_v3", bn="sync")
    chosen["moco_v3, clipped"].optim.clip_grad_norm = 0.1
    return chosen


def rank_batch(chosen: Settings, step: int) -> Batch:
    """Return this rank's share of a global batch, like the loader."""
    batch = chosen.data.batch
    given = [view.chunk(world())[rank()] for view in views(step, batch)]
    if chosen.model.bn != "shuffle":
        return batch_of(*given)
    order = shuffled_rows(0, step, batch)
    shuffled = {index: collectives.exchange(given[index], order) for index in needed_views(chosen, "kK")}
    return batch_of(*given, shuffled=shuffled, order=order)


def trained(chosen: Settings, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Train a few steps; return losses, gradients, buffers and queue by name."""
    model = built(chosen, accelerator)
    encoder, results = model.step.encoder, {}
    if chosen.gradient_accumulation_steps > 1:  # batch statistics would be of other parts
        encoder.eval()
        model.target.eval()

    def record(*_: Any) -> None:
        for name, p in encoder.named_parameters():
            if p.grad is not None:
                results[f"gradient {step} {name}"] = p.grad.clone()

    model.optimizer.optimizer.register_step_pre_hook(record)
    for step in range(STEPS):
        parts = model.step(rank_batch(chosen, step)).parts
        results |= {f"part {step} {name}": collectives.mean(value) for name, value in parts.items()}
    results |= {f"parameter {name}": p.detach().clone() for name, p in encoder.named_parameters()}
    if model.target is not None:
        results |= {f"momentum {name}": p.clone() for name, p in model.target.named_parameters()}
    if chosen.model.bn == "sync":
        results |= {f"buffer {name}": b.double().clone() for name, b in encoder.named_buffers()}
    if model.queue is not None:
        results |= {"queue": model.queue.keys.clone(), "position": model.queue.position}
    return results


def run_cases(names: list[str], out: str) -> None:
    """Train cases on this rank; write the results."""
    accelerator = Accelerator(cpu=True)
    assert world() == accelerator.num_processes > 1
    results = {name: trained(chosen, accelerator) for name, chosen in cases().items() if name in names}
    torch.save(results, Path(out) / f"{rank()}.pt")


@functools.cache
def alone(name: str) -> dict[str, torch.Tensor]:
    return trained(cases()[name], Accelerator(cpu=True))


def trained_on(world: int, names: list[str], factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Train on `world` ranks; return each one's results."""
    folder = made_once(factory, f"ranks{world}", lambda folder: on_ranks(world, run_cases, names, str(folder)))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    items = (item for item in request.session.items if item.module is request.module)  # type: ignore[attr-defined]
    asked = [item.callspec.params["name"] for item in items if item.originalname == "test_two_ranks_equal_one_process"]  # type: ignore[attr-defined]
    return trained_on(2, asked, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trained_on(4, FOUR, tmp_path_factory)


def is_slow(name: str) -> bool:
    """Return whether a case is a single term on another base than MoCo v2; all of a base's terms together are quick."""
    base, _, terms = name.partition(" + ")
    return base in ("moco_v1", "moco_v3", "simclr", "byol") and terms in TERMS.keys() - {"all"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if is_slow(name) else []) for name in cases()]
)
def test_two_ranks_equal_one_process(name: str, two: list[dict[str, Any]]) -> None:
    check(name, alone(name), two)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(name: str, four: list[dict[str, Any]]) -> None:
    check(name, alone(name), four)


def check(name: str, expected: dict[str, torch.Tensor], ranks: list[dict[str, Any]]) -> None:
    """Compare each rank's results with one process's. BatchNorm over two samples has large gradients."""
    assert any(key.startswith("gradient") and value.abs().max() > 1e-3 for key, value in expected.items())
    for results in ranks:
        assert results[name].keys() == expected.keys()
        for key, value in expected.items():
            scale = max(1.0, value.abs().max().item()) if "shuffle" in name else 1.0
            assert torch.allclose(results[name][key], value, atol=1e-9 * scale, rtol=0), key
    assert all(torch.equal(results[name][key], ranks[0][name][key]) for results in ranks for key in expected)


def twenty_step_cases() -> dict[str, Settings]:
    """Each base, alone and with all its terms, with steps small enough that rounding does not grow."""
    carried = dict.fromkeys(BASES, TERMS["all"])
    carried |= {"simclr": Terms(co2=CO2(), xmoco=XMoCo(), dcl=DCL())}
    carried |= {"byol": Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual())}
    cases = {name: settings(name, bn="sync") for name in BASES}
    cases |= {f"{name} + terms": settings(name, carried[name], bn="sync") for name in BASES}
    return {name: replace(case, optim=replace(case.optim, lr=0.001)) for name, case in cases.items()}


def run_twenty_steps(out: str) -> None:
    """Train with BatchNorm synchronized, and as an affine layer, in evaluation mode."""
    accelerator, results = Accelerator(cpu=True), {}
    for name, chosen in twenty_step_cases().items():
        for normalized in (True, False):
            model = built(chosen, accelerator)
            for module in (model.step.encoder, model.target):
                if module is not None:
                    module.train(normalized)
            losses = [collectives.mean(model.step(rank_batch(chosen, step)).parts["loss"]) for step in range(20)]
            queue = model.queue.keys if model.queue else torch.empty(0)
            case = name if normalized else f"{name}, no BatchNorm"
            results[case] = {"losses": torch.stack(losses), "queue": queue}
    torch.save(results, Path(out) / f"{world()} {rank()}.pt")


@pytest.mark.slow
def test_twenty_steps_on_one_two_and_four_ranks(tmp_path: Path) -> None:
    for size in (1, 2, 4):
        on_ranks(size, run_twenty_steps, str(tmp_path))
    alone, *others = (
        torch.load(tmp_path / f"{size} {number}.pt", weights_only=True) for size in (1, 2, 4) for number in range(size)
    )
    assert len(alone) == 2 * len(twenty_step_cases())
    largest = 0.0
    for name, expected in alone.items():
        assert expected["losses"].std() > 0, name
        for results in (other[name] for other in others):
            largest = max(largest, (results["losses"] - expected["losses"]).abs().max().item())
            assert torch.allclose(results["losses"], expected["losses"], atol=1e-9, rtol=0), name
            assert torch.allclose(results["queue"], expected["queue"], atol=1e-9, rtol=0), name
        assert all(torch.equal(results[name]["queue"], others[0][name]["queue"]) for results in others[:2])
        assert all(torch.equal(results[name]["queue"], others[2][name]["queue"]) for results in others[2:])
    print(f"{len(alone)} cases: losses differ by {largest:.1e} at most")


def run_collectives(out: str) -> None:
    Accelerator(cpu=True)
    rows = torch.arange(world() * 6 * 2).view(-1, 2).to(torch.uint8)
    local = rows.chunk(world())[rank()]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(rows))
        assert torch.equal(collectives.exchange(local, order), rows[order].chunk(world())[rank()])
    within = shuffled_rows(0, 0, len(rows), parts=world())
    assert torch.equal(collectives.exchange(local, within), rows[within].chunk(world())[rank()])
    assert torch.equal(collectives.gather(local), rows)
    first, second = collectives.gather_later(local), collectives.gather_later(2 * local)
    assert torch.equal(second(), 2 * rows)
    assert torch.equal(first(), rows)
    Path(out, str(rank())).touch()


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
                    if rank() == 1:
                        bad = replace(bad, views=(bad.views[0] * torch.inf, bad.views[1]))
                    result = model.step(bad)
                    assert result.parts["loss"].isfinite() == (rank() == 0 and name in ("moco_v2", "byol"))
                    assert not result.taken
                    model.step.schedule.skipped.zero_()
                    after = [value for module in modules for value in module.state_dict().values()]
                    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                model.step(rank_batch(chosen, step))
            ends.append([value.clone() for module in modules for value in module.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    Path(out, str(rank())).touch()


@pytest.mark.reliability
def test_non_finite_batch_of_one_rank_skips_the_step_on_all(tmp_path: Path, figure: Figure) -> None:
    on_ranks(2, run_poisoned, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    result = "4 base methods: parameters, momentum, queue, position, schedules bit-equal, and the run's end"
    figure("NaN on one rank in one step", result)


def run_compressed(out: str) -> None:
    """Compare gradients exchanged in float32 and in bfloat16, in one part and in two."""
    for accumulate in (1, 2):
        chosen, gradient_pairs = (
            replace(settings(), gradient_accumulation_steps=accumulate, cpu=True, tracker="none"),
            [],
        )
        for dtype in ("float32", "bfloat16"):
            exchanged = replace(chosen, gradient_dtype=dtype)  # type: ignore[arg-type]
            model = built(exchanged, build_accelerator(exchanged))
            gradients: list[torch.Tensor] = []
            model.optimizer.optimizer.register_step_pre_hook(
                lambda *_, model=model, gradients=gradients: gradients.append(
                    torch.cat([p.grad.flatten() for p in model.online.parameters()])
                )
            )
            model.step(rank_batch(chosen, 0))
            gradient_pairs.append(gradients[0])
        full, half = gradient_pairs
        assert torch.equal(half, half.bfloat16().double())
        assert not torch.equal(full, half)
        assert ((half - full).abs() <= 2**-7 * full.abs() + 2**-7 * full.abs().mean()).float().mean() > 0.97
        assert torch.nn.functional.cosine_similarity(full, half, dim=0) > 0.9999
    Path(out, str(rank())).touch()


def test_gradients_exchanged_in_bfloat16_are_only_rounded(tmp_path: Path) -> None:
    on_ranks(2, run_compressed, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
