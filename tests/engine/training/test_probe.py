"""The online linear probe: against PyTorch's layers and SGD, on ranks, in complete runs; what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from engine.config import settings as sections
from engine.config.settings import Settings
from engine.parallel.rendezvous import rank
from engine.training.build import build
from engine.training.loop import train, train_on
from engine.training.probe import Probe
from engine.training.resume import restore, save
from pipeline.prepare import prepare
from tests.engine import small
from tests.engine.evaluate.conftest import evaluate
from tests.engine.test_run import SMALL, main, metrics
from tests.engine.training import runs
from tests.gloo import on_ranks

FEATURES, CLASSES, BATCH, RATE = 6, 3, 8, 20.0
TAKEN, CPU = torch.tensor(1.0), torch.device("cpu")


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def labels() -> np.ndarray:
    """Labels of 40 samples, of which every fifth has none."""
    drawn = np.random.default_rng(0).integers(0, CLASSES, 40)
    return np.where(np.arange(40) % 5 == 0, -1, drawn)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, np.ndarray]]:
    """Features of other scales and means, and the ids of their samples."""
    generator, random = torch.Generator().manual_seed(1), np.random.default_rng(1)
    scale = torch.linspace(0.1, 3, FEATURES, dtype=dtype)
    features = (scale * (2 + torch.randn(BATCH, FEATURES, generator=generator, dtype=dtype)) for _ in range(count))
    return [(x, random.permutation(40)[:BATCH]) for x in features]


def test_updates_equal_batchnorm_linear_layer_and_sgd() -> None:
    with float64():
        probe = Probe(FEATURES, labels(), RATE, CPU)
        norm, linear = nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, CLASSES)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer, correct, count = torch.optim.SGD(linear.parameters(), RATE, momentum=0.9), 0, 0
    for features, ids in batches(12):
        target = torch.from_numpy(labels()[ids])
        logits = linear(norm(F.normalize(features)) / FEATURES**0.5)
        optimizer.zero_grad()
        F.cross_entropy(logits, target, ignore_index=-1).backward()
        optimizer.step()
        correct, count = correct + int((logits.argmax(1) == target).sum()), count + int((target >= 0).sum())
        probe.update(features, ids, TAKEN)
    assert torch.allclose(probe.weight[:, :-1], linear.weight, atol=1e-12, rtol=0)
    assert torch.allclose(probe.weight[:, -1], linear.bias, atol=1e-12, rtol=0)
    test = F.normalize(torch.cat([features for features, _ in batches(20)[12:]]))
    expected = linear(norm.eval()(test) / FEATURES**0.5).argmax(dim=1)
    assert torch.equal(probe.classify(test), expected)
    assert len(expected.unique()) > 1
    assert probe.take_accuracy() == {"probe_train_top1": correct / count}
    assert probe.take_accuracy() == {}


def test_skipped_step_and_batch_without_labels_teach_nothing() -> None:
    probe, (features, ids) = Probe(FEATURES, labels(), RATE, CPU), batches(1, torch.float32)[0]
    before = copy.deepcopy(probe.state_dict())
    probe.update(torch.full_like(features, torch.nan), ids, torch.tensor(0.0))
    assert all(torch.equal(before[name], value) for name, value in probe.state_dict().items())
    probe.update(features, np.arange(0, 40, 5), TAKEN)
    assert not probe.weight.any()
    assert not torch.equal(before["mean"], probe.mean)
    assert probe.take_accuracy() == {}


def update_on_ranks(folder: str) -> None:
    """Update a probe with this rank's halves, and take a step of MoCo v3 whose BatchNorm is synchronized."""
    Accelerator(cpu=True)
    probe = Probe(FEATURES, labels(), RATE, CPU)
    for features, ids in batches(5, torch.float32):
        probe.update(features.chunk(2)[rank()], np.split(ids, 2)[rank()], TAKEN)
    model = small.built(replace(small.settings("moco_v3", bn="sync"), probe=sections.Probe(every=1)))
    reference = copy.deepcopy(model.step.encoder)
    views = [view.chunk(2)[rank()] for view in small.views(0)]
    features = model.step(small.batch_of(*views)).features
    state = probe.state_dict() | {"features": features, "expected": first_features(reference, views)}
    torch.save(state, Path(folder, f"{rank()}.pt"))


def first_features(encoder: nn.Module, views: Any) -> torch.Tensor:
    """Return the backbone's features of the first view, noted by a hook."""
    noted: list[torch.Tensor] = []
    encoder.backbone.register_forward_hook(lambda module, inputs, output: noted.append(output.detach()))  # type: ignore[union-attr]
    encoder(*views)
    return torch.cat(noted)[: len(views[0])]


def test_two_ranks_have_the_probe_of_one(tmp_path: Path) -> None:
    on_ranks(2, update_on_ranks, str(tmp_path))
    probe = Probe(FEATURES, labels(), RATE, CPU)
    for features, ids in batches(5, torch.float32):
        probe.update(features, ids, TAKEN)
    for number in range(2):
        state = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert all(torch.equal(state[name], value) for name, value in probe.state_dict().items())
        assert torch.allclose(state["features"], state["expected"], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("moco_v2", {}),
        ("moco_v3", {}),
        ("moco_v3", {"gradient_accumulation_steps": 2}),
        ("simclr", {}),
        ("moco_v2", {"activation_checkpointing": True}),
    ],
)
def test_step_gives_the_features_of_the_first_view(method: str, more: dict[str, Any]) -> None:
    parts = more.get("gradient_accumulation_steps", 1)
    model = small.built(replace(small.settings(method), probe=sections.Probe(every=1), **more))
    reference, views = copy.deepcopy(model.step.encoder), small.views(3)
    given = views if len(model.step._queries) == 2 else views[:1]
    expected = [
        first_features(copy.deepcopy(reference), [view.chunk(parts)[part] for view in given]) for part in range(parts)
    ]
    features = model.step(small.batch_of(*views)).features
    assert features is not None
    assert not features.requires_grad
    assert torch.allclose(features, torch.cat(expected), atol=1e-12, rtol=0)
    assert model.step(small.batch_of(*views), measured=True).features is not None


def test_training_does_not_depend_on_the_probe() -> None:
    losses = []
    for every in (0, 1):
        model = small.built(replace(small.settings(), probe=sections.Probe(every=every)))
        losses.append([model.step(small.batch_of(*small.views(i))).parts["loss"].item() for i in range(3)])
    assert losses[0] == losses[1]


def probed(drawn: Path, out: Path) -> Settings:
    """Return settings of two epochs of six steps, logged and probed at odd times."""
    chosen = runs.settings(drawn, "plain")
    return replace(
        chosen,
        data=replace(chosen.data, eval=str(drawn)),
        optim=replace(chosen.optim, epochs=2),
        knn=sections.Knn(k=5),
        probe=sections.Probe(every=2, lr=0.5),
        log_every=4,
        out=str(out),
    )


def test_resumed_run_has_the_same_probe_bit_for_bit(drawn: Path, tmp_path: Path) -> None:
    summary = train(probed(drawn, tmp_path / "whole"))
    chosen = probed(drawn, tmp_path / "cut")
    run = build(chosen)
    restore(run)
    for _, batch in zip(range(3), run.loader, strict=False):  # in the middle of an interval
        train_on(run, batch, logs=False)
    save(run)
    run.close()
    train(replace(chosen, resume="auto"))
    lines = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == lines
    assert [line["step"] for line in lines if "probe_train_top1" in line] == [4, 6, 8, 12]
    assert [line["step"] for line in lines if "probe_top1" in line] == [6, 12]
    assert summary["probe_top1"] == lines[-1]["probe_top1"]
    ends = [load_file(next((tmp_path / n / "checkpoints").glob("*12/probe.safetensors"))) for n in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert ends[0]["weight"].any()


def test_probe_may_begin_and_end_when_a_run_is_resumed(drawn: Path, tmp_path: Path) -> None:
    chosen = probed(drawn, tmp_path / "out")
    none = sections.Probe()
    for probe, epochs in ((none, 1), (sections.Probe(every=1), 2), (none, 3)):
        optim = replace(chosen.optim, epochs=epochs, schedule="constant")
        train(replace(chosen, probe=probe, optim=optim, resume="auto", allow_change=["optim.epochs"]))
    assert [line["step"] for line in metrics(tmp_path / "out") if "probe_top1" in line] == [12]


def test_images_that_are_evaluated_teach_the_probe_nothing(drawn: Path, tmp_path: Path) -> None:
    run = build(probed(drawn, tmp_path / "out"))
    run.loader.close()
    hidden = np.flatnonzero(run.data.probe_labels < 0)  # type: ignore[operator]
    assert sorted(hidden.tolist()) == sorted(run.data.knn._test_ids.tolist())  # type: ignore[union-attr]
    assert (run.data.train.labels >= 0).all()


@pytest.fixture(scope="module")
def unlabeled(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without labels, as STL-10's."""
    folder = tmp_path_factory.mktemp("unlabeled")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
    prepare(str(folder / "images"), folder / "unlabeled.beton", workers=1, quiet=True)
    return folder / "unlabeled.beton"


def test_neighbors_of_a_bank_vote_as_in_evaluate_knn(
    drawn: Path, unlabeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training images have no labels, and play no part."""
    test = tmp_path / "test.beton"
    prepare("synthetic:60", test, workers=1, quiet=True)
    out, data = tmp_path / "out", ["--data.train", str(unlabeled), "--data.eval", str(test), "--knn.bank", str(drawn)]
    options = ["--data.batch", "20", "--optim.epochs", "1", "--precision", "no", "--knn.temperature", "0.1"]
    assert main(monkeypatch, *SMALL, *data, *options, "--out", str(out)) == 0
    [top1] = [line["knn_top1"] for line in metrics(out) if "knn_top1" in line]
    result = evaluate("knn", out, drawn, "--test", str(test), "--crop-ratio", "1", "--k", "5", "--temperature", "0.1")
    assert result["top1"] == pytest.approx(top1)


def test_other_neighbors_are_refused_when_resumed(
    drawn: Path, unlabeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.beton"
    prepare("synthetic:60", other, workers=1, quiet=True)
    given = ["--data.train", str(unlabeled), "--data.eval", str(drawn), *SMALL, "--data.batch", "20"]
    given += ["--optim.epochs", "1", "--out", str(tmp_path / "out"), "--optim.schedule", "constant"]
    assert main(monkeypatch, *given, "--knn.bank", str(drawn)) == 0
    more = ["--optim.epochs", "2", "--resume", "auto", "--allow-change", "optim.epochs", "--knn.bank", str(other)]
    capsys.readouterr()
    assert main(monkeypatch, *given, *more) == 2
    assert "add --allow-change data.eval" in capsys.readouterr().err
    assert main(monkeypatch, *given, *more, "--allow-change", "data.eval") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--knn.bank", "nowhere.beton", "--data.eval", "{drawn}"], "nowhere.beton: no such file"),
        (["--knn.bank", "{drawn}"], "knn.bank '{drawn}': kNN classifies no images"),
        (["--knn.bank", "{unlabeled}", "--data.eval", "{drawn}"], "has images without a label"),
        (["--data.train", "{unlabeled}", "--data.eval", "{drawn}"], "give labeled neighbors with --knn.bank F.beton"),
        (["--data.train", "{unlabeled}", "--probe.every", "5"], "probe.every 5: the images of {unlabeled} have no la"),
        (
            ["--probe.every", "1", "--data.eval", "{drawn}", "--knn.bank", "{drawn}"],
            "probe.every 1: data.eval is data.train, so that the probe trains on its test images",
        ),
        (["--probe.every", "-1"], "probe.every -1: choose a number of steps, or 0 for never"),
        (["--probe.lr", "0"], "probe.lr 0: choose a number above 0"),
        (["--tracker", "wandb,foo"], "tracker 'foo': choose some of tensorboard, wandb, mlflow"),
        (["--tracking.tags", "[1]"], "tracking.tags [1]: wrong type: give names such as [moco_v2, imagenet]"),
        (["--tracking.project", ""], "tracking.project '': give a name"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    drawn: Path,
    unlabeled: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"drawn": drawn, "unlabeled": unlabeled}
    given = [argument.format(**places) for argument in arguments]
    train = [] if "--data.train" in given else ["--data.train", str(drawn)]
    assert main(monkeypatch, *SMALL, *train, "--data.batch", "20", *given, "--out", str(tmp_path / "out")) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert message.format(**places) in line
    assert not (tmp_path / "out").exists()
