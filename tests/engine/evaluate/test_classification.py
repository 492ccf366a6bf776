"""Evaluations against scikit-learn and loops; frozen backbones stay, broken-off ones go on, processes agree."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.nn import functional as F

import engine.evaluate.nearest_neighbors as neighbors_module
from engine.evaluate import linear, linear_fast, semi_supervised, svm
from engine.evaluate.__main__ import run
from engine.evaluate.accuracy import interval, score
from engine.evaluate.linear import PROTOCOLS, Protocol
from engine.evaluate.nearest_neighbors import neighbors, vote
from methods.encoders import resnet
from pipeline.beton import Beton
from pipeline.storage.subset import Subset
from pipeline.system.errors import InputError, RunFailed
from tests.engine.breaking import broken_off_once
from tests.gloo import on_ranks


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small random encoder, as a state dict."""
    torch.manual_seed(0)
    torch.save(resnet("resnet18", stem="small", width=0.25).state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def evaluate(command: str, encoder: Path, drawn: Path, *more: str) -> dict[str, Any]:
    """Run a command on the drawn images at 32 pixels, and return what it wrote."""
    out = encoder.parent / "out"
    common = ["--train", str(drawn), "--size", "32", "--cpu", "--precision", "no", "--out", str(out), "--workers", "1"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    run([command, str(encoder), *common, *more])
    new = [path for path in out.glob("*.json") if before.get(path) != path.stat().st_mtime_ns]
    return json.loads(new[0].read_text()) if new else {}


# kNN


@pytest.mark.parametrize(("k", "temperature"), list(itertools.product((1, 10, 20, 100, 200), (0.07, 0.1))))
def test_knn_equals_scikit_learns_exactly(k: int, temperature: float) -> None:
    classifiers = pytest.importorskip("sklearn.neighbors")
    random = np.random.default_rng(k)
    labels = random.integers(0, 7, 900)
    means = random.normal(size=(7, 16))
    features = F.normalize(torch.from_numpy(means[labels] + 2 * random.normal(size=(900, 16))), dim=1)
    bank, queries, known = features[:600], features[600:], torch.from_numpy(labels[:600])
    similarity, near = neighbors(queries, bank, known, k)
    ranked = vote(similarity, near, temperature, 7)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    reference = classifiers.KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    reference.fit(bank.numpy(), known.numpy())
    assert (ranked[:, 0].numpy() == reference.predict(queries.numpy())).all()
    shares = reference.predict_proba(queries.numpy())
    for row, share in zip(ranked.numpy(), shares, strict=True):
        voted = row[row >= 0]
        assert (np.diff(share[reference.classes_.searchsorted(voted)]) <= 1e-12).all()
        assert len(voted) == min(5, (share > 0).sum())


def test_a_small_temperature_takes_the_nearest() -> None:
    """Votes of exp(1 / 0.001) are beyond all numbers there are; of two classes alike, that of the nearest wins."""
    similarity, near = torch.tensor([[0.9, 0.8, 0.8], [1.0, 1.0, 0.9]]), torch.tensor([[2, 0, 1], [3, 1, 0]])
    assert vote(similarity, near, 1e-3, 4)[:, 0].tolist() == [2, 1]
    assert vote(similarity, near, 1e-3, 4)[1, :3].tolist() == [1, 3, 0]


def test_knn_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = (F.normalize(torch.randn(n, 8), dim=1) for n in (50, 31))
    labels = torch.arange(50) % 3
    whole = neighbors(queries, bank, labels, 5)
    monkeypatch.setattr("engine.evaluate.nearest_neighbors._ELEMENTS", 200)
    parts = neighbors(queries, bank, labels, 5)
    assert torch.allclose(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def _merged_of_two() -> None:
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    queries, bank = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (50, 81))
    whole = neighbors(queries, bank, torch.arange(81), 5)
    neighbors_module._ELEMENTS = 120  # blocks of 3 queries for a share of 40, and of 2 for one of 41
    own = slice(0, 40) if accelerator.is_main_process else slice(40, 81)
    found = neighbors(queries, bank[own], torch.arange(81)[own], 5, merged=True)
    torch.testing.assert_close(found[0], whole[0])
    assert torch.equal(found[1], whole[1])


def test_shares_of_other_lengths_are_searched_in_the_same_blocks() -> None:
    on_ranks(2, _merged_of_two)


def test_knn_finds_an_image_among_its_copies(encoder: Path, drawn: Path) -> None:
    found = evaluate("knn", encoder, drawn, "--k", "1", "5")
    assert {(row["k"], row["temperature"]) for row in found["every"]} == {(k, t) for k in (1, 5) for t in (0.07, 0.1)}
    assert found["images"] == 20  # every tenth of each class
    assert found["interval"][0] <= found["top1"] <= found["interval"][1]
    with pytest.raises(InputError, match="--k 500: choose 1 to 180"):
        evaluate("knn", encoder, drawn, "--k", "500")


def _knn_of_two(encoder: str, drawn: str) -> None:
    evaluate("knn", Path(encoder), Path(drawn), "--k", "10", "150")


def test_two_processes_find_what_one_finds(encoder: Path, drawn: Path) -> None:
    """Of 150 neighbors neither process's 90 are enough: the nearest are those of both."""
    alone = evaluate("knn", encoder, drawn, "--k", "10", "150")
    on_ranks(2, _knn_of_two, str(encoder), str(drawn))
    both = json.loads((encoder.parent / "out" / "knn.json").read_text())
    assert both["processes"] == 2
    assert both["every"] == alone["every"]
    assert both["per_class"] == alone["per_class"]


# Scores


def test_scores_count_what_they_say() -> None:
    ranked = np.array([[0, 1, 2, 3, 4], [1, 4, 2, 3, 0], [5, 4, 3, 2, 1], [2, 0, 1, 3, 4]])
    found = score(ranked, np.array([0, 0, 0, 2]), ["a", "b", "c"])
    assert (found.top1, found.top5) == (0.5, 0.75)
    assert found.per_class == {"a": 1 / 3, "c": 1.0}
    assert found.mean_per_class == pytest.approx(2 / 3)


def test_the_interval_is_the_bootstraps() -> None:
    random = np.random.default_rng(3)
    right = random.random(400) < 0.7
    drawn = [random.choice(right, len(right)).mean() for _ in range(4000)]
    low, high = interval(right)
    assert low == pytest.approx(np.quantile(drawn, 0.025), abs=0.006)
    assert high == pytest.approx(np.quantile(drawn, 0.975), abs=0.006)


# Linear


def test_rates_are_the_published_ones() -> None:
    moco, v3 = PROTOCOLS["moco"], PROTOCOLS["moco_v3"]
    assert [moco.rate(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert v3.rate(0) == pytest.approx(0.1 * 1024 / 256)
    assert v3.rate(45) == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert Protocol(30, 512, 100, "steps").rate(0) == 60


def _problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of five classes that overlap, each feature of another scale: 3000 for training, 3000 for testing."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, 6000)
    x = (random.normal(size=(5, 24))[labels] + 1.6 * random.normal(size=(6000, 24))) * random.uniform(0.1, 5, 24)
    features, known = torch.from_numpy(x).float(), torch.from_numpy(labels)
    return features[:3000], known[:3000], features[3000:], known[3000:]


def _logistic(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, true: torch.Tensor) -> float:
    models = pytest.importorskip("sklearn.linear_model")
    scale = train.std(dim=0).clamp(min=1e-6)
    model = models.LogisticRegression(max_iter=2000, C=1.0).fit((train / scale).numpy(), labels.numpy())
    return float(model.score((test / scale).numpy(), true.numpy()))


def test_fast_is_as_good_as_logistic_regression() -> None:
    train, labels, test, true = _problem()
    expected = _logistic(train, labels, test, true)
    mean, deviation = linear_fast._statistics([(train, labels)])
    assert torch.allclose(mean, train.mean(dim=0), atol=1e-4)
    assert torch.allclose(deviation, train.std(dim=0, correction=0), rtol=1e-4)
    kept = [(((train - mean) / deviation).to(torch.bfloat16), labels)]
    pairs = list(itertools.product(linear_fast.RATES, linear_fast.DECAYS))
    table = linear_fast.sweep(kept, pairs, 5, 20, 100_000, 0)
    best = max(table, key=lambda pair: table[pair])
    weight, bias = linear_fast.train_heads(kept, [best], 5, 50, 0)
    right = (((test - mean) / deviation) @ weight[0].T + bias[0]).argmax(dim=1) == true
    assert 0.5 < expected < 0.95
    assert abs(right.double().mean().item() - expected) < 0.01


def test_heads_side_by_side_are_those_trained_alone_by_torchs_sgd() -> None:
    train, labels, _, _ = _problem()
    kept, pairs = [(train / 5, labels)], [(0.1, 0.0), (0.02, 1e-2)]
    together = linear_fast.train_heads(kept, pairs, 5, 2, seed=3)
    batch = min(1024, len(train) // 8)
    for number, (rate, decay) in enumerate(pairs):
        head = torch.nn.Linear(24, 5)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias], "weight_decay": 0.0}]
        optimizer, generator, step = torch.optim.SGD(groups, rate, 0.9), torch.Generator().manual_seed(3), 0
        for _ in range(2):
            for rows in torch.randperm(len(train), generator=generator).split(batch)[: len(train) // batch]:
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / (2 * (len(train) // batch))))
                optimizer.zero_grad()
                F.cross_entropy(head(train[rows] / 5), labels[rows]).backward()
                optimizer.step()
                step += 1
        assert torch.allclose(together[0][number], head.weight, atol=1e-5)
        assert torch.allclose(together[1][number], head.bias, atol=1e-5)


class _Crops:
    """Stands for the loader: batches of features that are already there, in place of crops."""

    def __init__(self, x: torch.Tensor, batch: int) -> None:
        self._x, self._batch, self._epoch = x, batch, 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]

    def __iter__(self) -> Any:
        order = np.random.default_rng(self._epoch).permutation(len(self._x))
        self._epoch += 1
        for at in range(0, len(order) - self._batch + 1, self._batch):
            ids = order[at : at + self._batch]
            yield type("Batch", (), {"views": (self._x[ids],), "ids": ids})

    def close(self) -> None:
        pass


class _Bench:
    """Stands for the bench: an encoder that is the identity."""

    device, first, classes, train = torch.device("cpu"), False, 5, None

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._x, self._y = x, y
        self.backbone = type("Backbone", (), {"features": x.shape[1]})
        self.args = type("Arguments", (), {"seed": 0, "protocol": "moco"})

    def labels(self, beton: Any) -> torch.Tensor:
        return self._y

    def train_loader(self, beton: Any, batch: int) -> _Crops:
        return _Crops(self._x, batch)

    def shown(self, items: Any, unit: str) -> Any:
        return items

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return images


class _Forgetful:
    """Keeps nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def restore(self) -> int:
        return 0

    def save(self, epoch: int) -> None:
        pass


@pytest.mark.parametrize(("name", "epochs"), [("moco", 60), ("moco_v3", 90)])
def test_protocols_are_as_good_as_logistic_regression(name: str, epochs: int) -> None:
    train, labels, test, true = _problem()
    scale = 30 if name == "moco" else 3  # rates as high as 30 are for features as small as a ResNet's
    expected = _logistic(train, labels, test, true)
    train, test = train / train.std(dim=0) / scale, test / train.std(dim=0) / scale
    usual = PROTOCOLS[name]
    protocol = Protocol(usual.lr, 100, epochs, usual.schedule)
    head, _ = linear.train(_Bench(train, labels), protocol, _Forgetful, {})  # type: ignore[arg-type]
    right = head(test).argmax(dim=1) == true
    assert abs(right.double().mean().item() - expected) < 0.01


def test_a_linear_classifier_goes_on_where_it_was(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--epochs", "3", "--batch", "32", "--lr", "1"]
    whole = evaluate("linear", encoder, drawn, *options)
    state = load_file(next((tmp_path / "out" / "linear_moco").glob("step_*/state.safetensors")))
    other = tmp_path / "other"
    other.mkdir()
    saves = broken_off_once(monkeypatch)
    again = other / "encoder.pth"
    again.write_bytes(encoder.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        evaluate("linear", again, drawn, *options)
    resumed = evaluate("linear", again, drawn, *options)
    assert saves == [1, 2, 3]
    assert resumed["per_class"] == whole["per_class"]
    found = load_file(next((other / "out" / "linear_moco").glob("step_*/state.safetensors")))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with pytest.raises(InputError, match=r"lr 1\.0 there, 2\.0 here"):
        evaluate("linear", again, drawn, *options[:-1], "2")


def test_a_backbone_that_changes_is_found_out(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.evaluate.classification import Bench

    embed = Bench.embed

    def training_mode(self: Bench, images: torch.Tensor) -> torch.Tensor:
        self.backbone.train()  # the usual mistake: running statistics move
        return embed(self, images)

    monkeypatch.setattr(Bench, "embed", training_mode)
    with pytest.raises(RunFailed, match="backbone changed"):
        evaluate("linear", encoder, drawn, "--epochs", "1", "--batch", "32")


@pytest.mark.parametrize("passes", ["0", "2"])
def test_fast_runs_on_images(encoder: Path, drawn: Path, passes: str) -> None:
    found = evaluate("linear", encoder, drawn, "--protocol", "fast", "--passes", passes, "--epochs", "5")
    assert len(found["sweep"]) == len(linear_fast.RATES) * len(linear_fast.DECAYS)
    best = max(found["sweep"], key=lambda row: row["held_back"])
    assert (found["settings"]["lr"], found["settings"]["weight_decay"]) == (best["lr"], best["decay"])
    assert found["images"] == 20


def _count_embedded(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> list[int]:
    """Return a list whose one number counts the batches that are embedded; in the place of that one comes Ctrl-C."""
    from engine.evaluate.classification import Bench

    embed, calls = Bench.embed, [0]

    def counted(self: Bench, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(Bench, "embed", counted)
    return calls


@pytest.mark.parametrize(("passes", "again"), [("2", 4 + 1), ("0", 4 + 1)])
def test_fast_goes_on_after_its_last_whole_pass(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, passes: str, again: int
) -> None:
    options = ["--protocol", "fast", "--passes", passes, "--epochs", "2", "--batch", "45"]  # four batches a pass
    whole = evaluate("linear", encoder, drawn, *options)
    other = encoder.parent / "other" / "encoder.pth"
    other.parent.mkdir()
    other.write_bytes(encoder.read_bytes())
    with monkeypatch.context() as first:
        _count_embedded(first, stop_at=6 if passes == "2" else 3)
        with pytest.raises(KeyboardInterrupt):
            evaluate("linear", other, drawn, *options)
    calls = _count_embedded(monkeypatch)
    resumed = evaluate("linear", other, drawn, *options)
    assert calls[0] == again  # a pass, and the test images
    for key in ("per_class", "sweep", "settings"):
        assert resumed[key] == whole[key]
    kept, begun_anew = (sorted((path.parent / "out" / "linear_fast").iterdir()) for path in (encoder, other))
    assert [path.name for path in kept] == [path.name for path in begun_anew]
    for left, right in zip(kept, begun_anew, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_fast_computes_features_anew_where_they_do_not_fit(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--protocol", "fast", "--passes", "0", "--epochs", "1"]
    evaluate("linear", encoder, drawn, *options)
    file = encoder.parent / "out" / "linear_fast" / "center.safetensors"
    good, calls = file.read_bytes(), _count_embedded(monkeypatch)
    evaluate("linear", encoder, drawn, *options, "--lr", "0.1")
    assert calls[0] == 1  # the test images alone
    with safe_open(file, "pt") as opened:
        about, x, ids = opened.metadata(), opened.get_tensor("features"), opened.get_tensor("ids")
    others = [{"features": x, "ids": ids + 1}, {"features": x.float(), "ids": ids}, {"features": x[1:], "ids": ids}]
    for spoilt in (good[:-9], b"", *(save(other, metadata=about) for other in (*others, {"ids": ids}))):
        file.write_bytes(spoilt)
        evaluate("linear", encoder, drawn, *options)
        assert file.read_bytes() == good
        assert "computed anew" in capsys.readouterr().err
    evaluate("linear", encoder, drawn, *options, "--batch", "90")
    assert "are of other settings" in capsys.readouterr().err
    assert calls[0] == 1 + 6 * 2 + 3


# Fine-tuning


def test_labels_are_drawn_evenly_by_seed() -> None:
    labels = np.repeat(np.arange(5), (100, 50, 30, 3, 200))
    chosen = semi_supervised.balanced(labels, 0.1, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 3, 1, 20]
    assert (chosen == semi_supervised.balanced(labels, 0.1, seed=1)).all()
    assert (chosen != semi_supervised.balanced(labels, 0.1, seed=2)).any()


def test_labels_are_taken_by_name(drawn: Path, tmp_path: Path) -> None:
    beton, names = Beton(drawn), tmp_path / "10percent.txt"
    names.write_text(f"{Path(beton.name(7)).name}\n{beton.name(3)}\n\n")
    assert semi_supervised.named(beton, names).tolist() == [3, 7]
    names.write_text("n01440764_10043.JPEG\n")
    with pytest.raises(InputError, match="n01440764_10043"):
        semi_supervised.named(beton, names)


def test_fine_tuning_moves_the_backbone_and_goes_on(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--labels", "0.5", "--epochs", "2", "--batch", "30"]
    whole = evaluate("semi", encoder, drawn, *options)
    assert whole["images"] == 90
    folder = encoder.parent / "out" / "semi_0.5"
    first = load_file(next(folder.glob("step_*/state.safetensors")))
    weights = torch.load(encoder, weights_only=True)
    assert not torch.equal(first["model|backbone.conv1.weight"], weights["conv1.weight"])
    again = evaluate("semi", encoder, drawn, *options)  # from what was kept: nothing is left to train
    assert again["per_class"] == whole["per_class"]
    assert again["training_seconds"] < whole["training_seconds"]


def test_fine_tuning_broken_off_ends_where_the_undisturbed_does(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--labels", "0.5", "--epochs", "3", "--batch", "30"]
    whole = evaluate("semi", encoder, drawn, *options)
    other = encoder.parent / "other" / "encoder.pth"
    other.parent.mkdir()
    other.write_bytes(encoder.read_bytes())
    saves = broken_off_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate("semi", other, drawn, *options)
    resumed = evaluate("semi", other, drawn, *options)
    assert saves == [1, 2, 3]
    assert resumed["per_class"] == whole["per_class"]
    ends = [load_file(next(e.parent.glob("out/semi_0.5/step_*/state.safetensors"))) for e in (encoder, other)]
    assert ends[0].keys() == ends[1].keys()
    assert any(name.startswith("momentum|backbone.") for name in ends[0])
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


# SVMs and features


def _voc(folder: Path, beton: Beton, test: bool) -> Path:
    """ImageSets/Main of a beton whose images are of one class each, and of a second: that of their number's parity."""
    folder.mkdir()
    part = [index for index in range(len(beton)) if (index % 3 == 1) == test]
    for label, name in [*enumerate(beton.classes), (-1, "odd")]:
        lines = []
        for index in part:
            is_it = index % 2 if label < 0 else beton.labels[index] == label
            difficult = index % 17 == 0
            lines.append(f"{Path(beton.name(index)).stem} {0 if difficult else 1 if is_it else -1:2d}")
        (folder / f"{name}_{'test' if test else 'trainval'}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_svms_score_as_scikit_learn_does(encoder: Path, drawn: Path, tmp_path: Path) -> None:
    machines, metrics = pytest.importorskip("sklearn.svm"), pytest.importorskip("sklearn.metrics")
    train, test = (_voc(tmp_path / str(side), Beton(drawn), side) for side in (False, True))
    found = evaluate("svm", encoder, drawn, "--sets", str(train), "--test-sets", str(test), "--costs", "1")
    evaluate_to = tmp_path / "f.safetensors"
    run(["features", str(encoder), "--train", str(drawn), "--size", "32", "--cpu", "--precision", "no", "--to",
         str(evaluate_to), "--out", str(tmp_path / "out"), "--workers", "1"])  # fmt: skip
    x = F.normalize(load_file(evaluate_to)["features"], dim=1).numpy()
    beton = Beton(drawn)
    names, labels, rows = svm.multi_labels(train, "trainval", beton)
    _, true, queries = svm.multi_labels(test, "test", beton)
    assert sorted(names) == sorted([*beton.classes, "odd"])
    precisions = []
    for column in range(len(names)):
        known, asked = labels[:, column] != 0, true[:, column] != 0
        machine = machines.LinearSVC(C=1.0, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0)
        machine.fit(x[rows[known]], labels[known, column])
        decision = machine.decision_function(x[queries[asked]])
        precisions.append(metrics.average_precision_score(true[asked, column] == 1, decision))
    assert found["map"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert found["interval"][0] < found["map"] < found["interval"][1]


def test_features_go_on_where_they_were(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.evaluate.classification import Bench

    common = ["--size", "32", "--cpu", "--precision", "no", "--workers", "1", "--batch", "2", "--train", str(drawn)]
    whole, parts = encoder.parent / "whole.npy", encoder.parent / "parts.npy"
    run(["features", str(encoder), *common, "--to", str(whole)])
    embed, calls = Bench.embed, [0]

    def broken(self: Bench, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 70:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(Bench, "embed", broken)
    with pytest.raises(KeyboardInterrupt):
        run(["features", str(encoder), *common, "--to", str(parts)])
    assert not parts.exists()
    run(["features", str(encoder), *common, "--to", str(parts)])
    assert calls[0] == 70 + 50  # batches 51 to 100 anew: it was kept after 50
    assert (np.load(whole) == np.load(parts)).all()
    assert np.load(parts.with_suffix(".ids.npy")).tolist() == list(range(200))
    assert np.load(parts.with_suffix(".labels.npy")).tolist() == Beton(drawn).labels.tolist()
    assert not list(encoder.parent.glob(".parts*"))


def test_a_subset_reads_the_samples_of_the_whole(drawn: Path) -> None:
    whole = Beton(drawn)
    part = Subset(whole, np.array([150, 3, 77]))
    assert len(part) == 3
    assert part.labels.tolist() == whole.labels[[150, 3, 77]].tolist()
    assert part.name(1) == whole.name(3)
    assert (part.record(2) == whole.record(77)).all()
    assert part.fingerprint != Subset(whole, np.array([150, 3, 78])).fingerprint != whole.fingerprint
