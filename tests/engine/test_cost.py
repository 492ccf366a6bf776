"""What a step costs besides its encoders: operators that do not grow with depth, collectives that are counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from engine import ranks
from engine.build import Model, build_accelerator
from engine.config import Optim
from methods.registry import Terms
from methods.residual import Residual
from tests.engine.small import BATCH, batch_of, built, settings, views
from tests.gloo import on_ranks


class Counting(TorchDispatchMode):
    """Counts the operators that Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(arch: str, optimiser: str) -> Counter[str]:
    """The operators of the guard's check, the optimiser's second step and the moving average."""
    chosen = settings("moco_v2")
    chosen = replace(chosen, model=replace(chosen.model, arch=arch), optim=Optim(name=optimiser, lr=0.1))  # type: ignore[arg-type]
    model = built(chosen)
    assert model.target is not None
    model.step(batch_of(*views(0)))
    for p in model.step.encoder.parameters():
        p.grad = torch.ones_like(p)
    with Counting() as counting:
        taken = model.step._update()
        assert taken
        model.step.moving_average.update(0.1)
    return counting.calls


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "lars"])
def test_optimiser_and_moving_average_are_as_many_operators_at_any_depth(optimiser: str) -> None:
    shallow, deep = counted("resnet18", optimiser), counted("resnet34", optimiser)
    assert shallow == deep
    assert sum(deep.values()) <= {"sgd": 12, "adamw": 14, "lars": 26}[optimiser]


def collectives(model: Model, chosen: Any) -> dict[str, list[int]]:
    """The collectives of a step, by name: elements of each."""
    given = [
        batch_of(*(v.chunk(ranks.world())[ranks.rank()] for v in views(step, chosen.data.batch))) for step in range(3)
    ]
    for batch in given[:2]:  # the first two arrange the gradients' buckets
        model.step(batch)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        model.step(given[2])
    found: dict[str, list[int]] = {}
    for event in profiled.events():
        if event.name.startswith("gloo:"):
            shapes = [torch.Size(shape).numel() for shape in event.input_shapes if shape]
            found.setdefault(event.name.removeprefix("gloo:"), []).append(sum(shapes))
    return found


def run(out: str) -> None:
    accelerator, found = build_accelerator(replace(settings(), cpu=True, tracker="none")), {}
    for name, terms in (("moco_v2", Terms()), ("moco_v2 + residual", Terms(residual=Residual())), ("byol", Terms())):
        chosen = settings(name.split(" ")[0], terms)
        model = built(chosen, accelerator)
        found[name] = {"collectives": collectives(model, chosen), "parameters": _trained(model)}
    Path(out, f"{ranks.rank()}.json").write_text(json.dumps(found))


def _trained(model: Model) -> int:
    return sum(p.numel() for p in model.step.encoder.parameters() if p.requires_grad)


def test_a_step_sends_gradients_and_keys_and_nothing_else(tmp_path: Path) -> None:
    """MoCo v2: buckets that together are the parameters, and one gather of the keys. BYOL: no keys either."""
    on_ranks(2, run, str(tmp_path))
    for rank in range(2):
        for name, case in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            sent = case["collectives"]
            assert sum(sent.pop("all_reduce")) == case["parameters"]
            gathered = [] if name == "byol" else [BATCH // 2 * 16]
            assert [n for sizes in sent.values() for n in sizes] == gathered
