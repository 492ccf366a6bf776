"""The cost of a step without its encoders: operators that do not grow with depth, and counted collectives."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config.settings import Optim
from engine.parallel.accelerator import DTYPES, build_accelerator
from engine.parallel.rendezvous import rank, world
from engine.training.build import build
from engine.training.dry_run import estimate
from engine.training.loop import train_on
from engine.training.model import Model, build_model
from engine.training.resume import restore, save
from methods.co2 import CO2
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from tests.engine.small import BATCH, batch_of, built, settings, views
from tests.engine.training.runs import settings as shuffled_settings
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


def counted(arch: str, optimizer: str) -> Counter[str]:
    """Count the operators of the non-finite check, the optimizer's second step and the moving average."""
    chosen = settings("moco_v2")
    chosen = replace(chosen, model=replace(chosen.model, arch=arch), optim=Optim(name=optimizer, lr=0.1))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_optimizer_and_moving_average_have_as_many_operators_at_any_depth(optimizer: str) -> None:
    shallow, deep = counted("resnet18", optimizer), counted("resnet34", optimizer)
    assert shallow == deep
    assert sum(deep.values()) <= {"sgd": 12, "adamw": 14, "lars": 26}[optimizer]


class Layouts(TorchDispatchMode):
    """Counts operators on images, and the operators with an image that is not channels-last."""

    IMAGES = ("convolution", "batch_norm", "relu", "threshold", "pool", "add", "cat", "clone", "copy", "lerp")

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.others = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        images = [t for t in tree_leaves((args, results)) if isinstance(t, torch.Tensor) and t.ndim == 4]
        images = [t for t in images if t.shape[1] > 1 and t.shape[2] * t.shape[3] > 1]  # else both layouts are the same
        images = [t for t in images if 0 not in t.stride()]  # of the mean's gradient, which has none
        if images and any(kind in name for kind in self.IMAGES):
            self.seen[name] += 1
            if not all(t.is_contiguous(memory_format=torch.channels_last) for t in images):
                self.others[name] += 1
        return results


@pytest.mark.parametrize(("bn", "precision"), [("plain", "no"), ("split", "no"), ("plain", "bf16")])
@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "small"), ("resnet50", "imagenet")])
def test_every_image_of_a_step_is_channels_last(arch: Any, stem: Any, bn: str, precision: str) -> None:
    """Forward and backward: no operator has to convert an image."""
    chosen = settings("moco_v2", bn=bn, batch=16)
    chosen = replace(chosen, model=replace(chosen.model, arch=arch, stem=stem, width=0.25))
    model = build_model(chosen, Accelerator(cpu=True, mixed_precision=precision))
    inputs = [
        view.to(DTYPES[precision]).repeat(1, 1, 4, 4).to(memory_format=torch.channels_last) for view in views(0, 16)
    ]
    with Layouts() as layouts:
        model.step(batch_of(*inputs))
    assert sum(count for name, count in layouts.seen.items() if "convolution_backward" in name) >= 20
    assert not layouts.others


class Traffic(TorchDispatchMode):
    """Notes the bytes that this rank sends to each collective, by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {}
        self.order: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            tensors = args[1] if name.startswith(("allgather", "alltoall")) else args[0]
            sent = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]
            self.order.append((name, sum(t.nbytes for t in sent)))
            self.sent.setdefault(name, []).append(self.order[-1][1])
        return func(*args, **(kwargs or {}))


METHODS: dict[str, tuple[str, Terms, dict[str, Any]]] = {
    "moco_v1": ("moco_v1", Terms(), {}),
    "moco_v2": ("moco_v2", Terms(), {}),
    "moco_v2, co2, residual": ("moco_v2", Terms(co2=CO2(), residual=Residual()), {}),
    "moco_v2, xmoco": ("moco_v2", Terms(xmoco=XMoCo()), {}),
    "moco_v2, in bfloat16": ("moco_v2", Terms(), {"gradient_dtype": "bfloat16"}),
    "moco_v2, accumulated": ("moco_v2", Terms(), {"gradient_accumulation_steps": 2}),
    "moco_v3": ("moco_v3", Terms(), {}),
    "simclr": ("simclr", Terms(), {}),
    "byol": ("byol", Terms(), {}),
}
KEYS = BATCH // 2 * 16 * 8
"""Bytes of one rank's keys of a view, in float64."""


def needed_bytes(case: str, parameters: int) -> dict[str, list[int]]:
    """Return the bytes that one rank has to send, in the order of the collectives."""
    gathers = {"moco_v2, xmoco": 2, "moco_v3": 2, "simclr": 2, "byol": 0}.get(case, 1)
    # a gather with gradient sums that of all rows on its way back
    sums = {"moco_v2, xmoco": 1, "simclr": 2}.get(case, 0)
    gradients = parameters * (2 if "bfloat16" in case else 8)
    return {"allgather_base": [KEYS] * gathers, "allreduce": [2 * KEYS] * sums + [gradients]}


def run(out: str) -> None:
    results = {}
    for case, (name, terms, more) in METHODS.items():
        chosen = replace(settings(name, terms), cpu=True, tracker="none", **more)
        model = built(chosen, build_accelerator(chosen))
        halves = [[v.chunk(world())[rank()] for v in views(step)] for step in range(4)]
        for half in halves[:-1]:
            model.step(batch_of(*half))
        with Traffic() as traffic:
            model.step(batch_of(*halves[-1]))
        results[case] = {"sent": traffic.sent, "parameters": count_trained(model), "padding": count_padding(model)}
    Path(out, f"{rank()}.json").write_text(json.dumps(results))


def count_trained(model: Model) -> int:
    return sum(p.numel() for p in model.step.encoder.parameters() if p.requires_grad)


def count_padding(model: Model) -> int:
    """Return the elements between gradients in their buffer, in which each begins at a multiple of 64."""
    return sum(-p.numel() % 64 for p in model.step.encoder.parameters() if p.requires_grad)


def test_step_sends_gradients_and_keys_alone(tmp_path: Path) -> None:
    """MoCo v2: buckets of all gradients, and one gather of the keys. BYOL: no keys either."""
    on_ranks(2, run, str(tmp_path))
    everyone = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert everyone[0] == everyone[1]  # the same collectives, in the same order
    for results in everyone:
        assert results.keys() == METHODS.keys()
        for case, result in results.items():
            expected = needed_bytes(case, result["parameters"])
            sums, gathers = result["sent"]["allreduce"], result["sent"].get("allgather_base", [])
            assert result["sent"].keys() <= expected.keys(), case
            assert gathers == expected["allgather_base"], case
            *others, gradients = expected["allreduce"]
            assert sums[: len(others)] == others, case
            sent = sums[len(others) :]
            assert len(sent) <= 3, case
            assert sum(sent) == gradients + (gradients // result["parameters"]) * result["padding"], case


def run_synchronized(out: str) -> None:
    chosen = replace(settings("moco_v2", bn="sync"), cpu=True, tracker="none")
    model = built(chosen, build_accelerator(chosen))
    half = [v.chunk(world())[rank()] for v in views(0)]
    for _ in range(3):
        model.step(batch_of(*half))
    with Traffic() as traffic:
        model.step(batch_of(*half))
    norms = [module for module in model.step.encoder.modules() if isinstance(module, _BatchNorm)]
    counts = {"layers": len(norms), "channels": sum(norm.num_features for norm in norms)}
    result = {"sent": traffic.sent, **counts, "gradients": count_trained(model) + count_padding(model)}
    Path(out, f"{rank()}.json").write_text(json.dumps(result))


def test_synchronized_batchnorm_sends_its_statistics_once_per_layer(tmp_path: Path) -> None:
    """A gather in the forward passes, for both encoders, and a sum in the backward pass of the online encoder."""
    on_ranks(2, run_synchronized, str(tmp_path))
    everyone = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert everyone[0] == everyone[1]
    sent, layers, channels = (everyone[0][key] for key in ("sent", "layers", "channels"))
    statistics = 2 * 8 * channels  # mean and variance, in float64
    assert len(sent["allgather_base"]) == layers + 1
    assert sum(sent["allgather_base"]) == 2 * statistics + KEYS
    assert len(sent["allreduce"]) > layers
    assert sum(sent["allreduce"]) == statistics + 8 * everyone[0]["gradients"]
    plain = estimate(replace(settings("moco_v2", bn="sync"), cpu=True, tracker="none"))
    assert plain["norm_passes"] == (layers, layers)


CASES = ("plain", "logged", "saved", "skipped", "skipped, logged")


def run_shuffled(beton: str, out: str) -> None:
    """Take steps with shuffled keys, from the loader on: plain, logged, saved, skipped."""
    chosen = shuffled_settings(Path(beton), "shuffle")
    run = build(replace(chosen, out=f"{out}/run", optim=replace(chosen.optim, epochs=5)))
    restore(run)
    batches = run.loader.endless()
    for _ in range(3):
        train_on(run, next(batches), logs=False)
    sent = {}
    for case in CASES:
        before = [p.clone() for p in run.model.step.encoder.parameters()]
        with Traffic() as traffic:
            batch = next(batches)
            if "skipped" in case and rank() == 1:
                assert batch.views[0] is not None
                batch.views[0].fill_(torch.nan)
            train_on(run, batch, logs="logged" in case)
            if case == "saved":
                save(run)
        taken = any(not torch.equal(*pair) for pair in zip(before, run.model.step.encoder.parameters(), strict=True))
        assert taken == ("skipped" not in case)
        sent[case] = traffic.order
    run.close()
    result = {"sent": sent, "gradients": count_trained(run.model) + count_padding(run.model)}
    Path(out, f"{rank()}.json").write_text(json.dumps(result))


def test_shuffled_batchnorm_exchanges_one_view_in_the_same_order_on_all_ranks(drawn: Path, tmp_path: Path) -> None:
    on_ranks(2, run_shuffled, str(drawn), str(tmp_path))
    one, other = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert one == other  # the same sequence and bytes, also where one rank alone has a step to skip
    sent = {case: [tuple(each) for each in order] for case, order in one["sent"].items()}
    assert sent.keys() == set(CASES)
    view = 16 * 3 * 16**2 * 4  # float32, of a rank's share of the keys' view; on a GPU its crops, uint8
    gradients = [size for name, size in sent["plain"] if name == "allreduce"]
    assert [each for each in sent["plain"] if each[0] != "allreduce"] == [
        ("alltoall_base", view),
        ("allgather_base", 16 * 16 * 4),
    ]
    assert sum(gradients) == 4 * one["gradients"]
    for case, order in sent.items():
        assert order[0] == ("alltoall_base", view), case
        assert [name for name, _ in order].count("alltoall_base") == 1, case
    assert sent["skipped"] == sent["plain"]
    early, late = sent["logged"], sent["skipped, logged"]
    assert [name for name, _ in early] == [name for name, _ in late]
    assert sum(size for _, size in early) - sum(size for _, size in late) == 2 * 8  # losses: of five steps, of three
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").is_dir()
