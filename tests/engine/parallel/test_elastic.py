"""A run resumed with another world size trains on the same batches, with nearly the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.cli import parse
from engine.evaluate import nearest_neighbors
from engine.evaluate.online_knn import Knn
from engine.parallel import collectives
from engine.parallel.batchnorm_stats import RunningStatistics
from engine.training.build import build
from engine.training.loop import evaluate
from engine.training.resume import modules, restore, save
from methods.encoders import resnet
from pipeline.beton import Beton
from pipeline.loader import Batch
from tests.engine.test_run import SMALL
from tests.gloo import on_ranks

EPOCHS, STEPS = 3, 5  # of five steps each


def in_float64(batch: Batch) -> Batch:
    views = tuple(None if view is None else view.double() for view in batch.views)
    return replace(batch, views=views, shuffled={index: view.double() for index, view in batch.shuffled.items()})


def train(arguments: list[str], steps: int, notes: str, exact: bool) -> None:
    """Start or resume the run for some steps; save, and note samples and losses."""
    settings = parse([*SMALL, "--precision", "no", "--optim.epochs", str(EPOCHS), *arguments])
    if exact:  # in float64, where rounding does not show
        torch.set_default_dtype(torch.float64)
    run = build(replace(settings, resume="auto"))
    if exact and run.model.queue is not None:
        run.model.queue.double()
    notes_now: list[dict[str, Any]] = []
    try:
        restore(run)
        while steps:
            for batch in run.loader:
                result = run.model.step(in_float64(batch) if exact else batch)
                run.done += 1
                run.monitor.add(result, 40, 0.0)
                ids = collectives.gather(torch.from_numpy(batch.ids).to(torch.int32))
                loss = collectives.mean(result.parts["loss"])
                notes_now.append({"epoch": batch.epoch, "step": batch.step, "ids": ids.tolist(), "loss": loss.item()})
                steps -= 1
                if not steps:
                    break
        save(run)
        run.writer.finish()
        if run.data.knn is not None and not exact:
            evaluate(run, EPOCHS)
        state = {name: value.clone() for name, value in modules(run).state_dict().items()}
        if collectives.rank() == 0:
            path = Path(notes)
            before = torch.load(path, weights_only=True)["notes"] if path.exists() else []
            top1 = run.monitor.last.get("knn_top1")
            torch.save({"notes": before + notes_now, "state": state, "top1": top1}, path)
    finally:
        run.monitor.close()
        run.loader.close()


def trained(folder: Path, pieces: list[tuple[int, int]], *arguments: str, exact: bool = False) -> dict[str, Any]:
    """Train in pieces of (world size, steps)."""
    folder.mkdir()
    for world, steps in pieces:
        on_ranks(world, train, [*arguments, "--out", str(folder / "out")], steps, str(folder / "notes.pt"), exact)
    return torch.load(folder / "notes.pt", weights_only=True)


@pytest.mark.parametrize(
    ("pieces", "method"),
    [
        ([(1, 3), (2, 6), (1, 6)], ["--model.bn", "shuffle"]),
        pytest.param(
            [(4, 7), (2, 8)],
            ["--model.bn", "shuffle", "--data.order", "quasi_random", "--micro_batch", "10"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_world_sizes_train_on_the_same_batches(
    pieces: list[tuple[int, int]], method: list[str], drawn: Path, tmp_path: Path
) -> None:
    arguments = ["--data.train", str(drawn), "--data.eval", str(drawn), *method]
    exact = len(pieces) == 2  # four ranks sum in another order than one, and training amplifies the difference
    once = trained(tmp_path / "once", [(1, EPOCHS * STEPS)], *arguments, exact=exact)
    parts = trained(tmp_path / "parts", pieces, *arguments, exact=exact)
    places = [(note["epoch"], note["step"]) for note in parts["notes"]]
    assert places == [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    for one, other in zip(once["notes"], parts["notes"], strict=True):
        assert one["ids"] == other["ids"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9 if exact else 1e-6)
    for epoch in range(EPOCHS):
        seen = [i for note in parts["notes"] if note["epoch"] == epoch for i in note["ids"]]
        assert sorted(seen) == list(range(200))
    assert exact or once["top1"] == pytest.approx(parts["top1"], abs=0.11)  # of twenty images


def nearest(out: str) -> None:
    """Classify on several ranks, with uneven shares of the bank, one of them smaller than k."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 8, generator=generator)) for n in (35, 50))
    labels = torch.randint(0, 4, (35,), generator=generator)
    local = [part.tolist() for part in torch.arange(35).tensor_split([5, 20])][collectives.rank()]
    for k in (1, 7, 20, 35, 200):
        settings: dict[str, Any] = {"k": k, "temperature": 0.1, "classes": 4}
        expected = nearest_neighbors.classify(queries, bank, labels, **settings)
        nearest_neighbors._MAX_ROWS = 16
        classes = nearest_neighbors.classify(queries, bank[local], labels[local], sharded=True, **settings)
        assert torch.equal(classes, expected)
    counts = [3, 0, 4]
    rows = torch.arange(7)[:, None].repeat(1, 2)
    assert torch.equal(collectives.gather_uneven(rows.split(counts)[collectives.rank()], counts), rows)
    Path(out, str(collectives.rank())).touch()


def classify(out: str) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True)
    nearest(out)


def test_neighbors_are_found_over_all_ranks(tmp_path: Path) -> None:
    on_ranks(3, classify, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def evaluate_differing(drawn: str, out: str, world: int) -> None:
    """Evaluate an encoder whose running statistics differ between ranks, and note the result."""
    from accelerate import Accelerator

    Accelerator(cpu=True)
    torch.manual_seed(0)
    backbone = resnet("resnet18", stem="small", width=0.125)
    statistics = RunningStatistics(backbone)
    rows = 0.5 + torch.rand(world, statistics.local().numel(), generator=torch.Generator().manual_seed(1))
    if collectives.world() == 1:
        statistics.put(rows.double().mean(dim=0).float())
    else:
        statistics.put(rows[collectives.rank()])
    few = {"k": 3, "temperature": 0.1, "device": torch.device("cpu"), "size": 32, "batch": 64}
    knn = Knn(Beton(drawn), Beton(drawn), limit=2, **few), Knn(Beton(drawn), Beton(drawn), **few)
    with statistics.averaged():
        results = {"top1": [k.top1(backbone) for k in knn], "local": statistics.local()}
    if collectives.world() > 1:
        assert torch.equal(statistics.local()[0], rows[collectives.rank()])
    torch.save(results, Path(out, f"{collectives.world()}.{collectives.rank()}"))


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_all_ranks_evaluate_the_mean_of_their_statistics(world: int, drawn: Path, tmp_path: Path) -> None:
    on_ranks(world, evaluate_differing, str(drawn), str(tmp_path), world)
    on_ranks(1, evaluate_differing, str(drawn), str(tmp_path), world)
    alone = torch.load(tmp_path / "1.0", weights_only=True)
    for rank in range(world):
        results = torch.load(tmp_path / f"{world}.{rank}", weights_only=True)
        assert torch.equal(results["local"], alone["local"])
        assert results["top1"] == alone["top1"]
