"""The fast protocol: as good as logistic regression, exact after an interruption, and a cache that is checked."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.nn import functional as F

from engine.evaluate import linear_fast
from engine.evaluate.classification import ClassificationEvaluation
from tests.engine.evaluate.conftest import copy_of, evaluate, logistic_regression, problem


def test_it_is_as_good_as_logistic_regression() -> None:
    train, labels, test, true = problem()
    expected = logistic_regression(train, labels, test, true)
    mean, deviation = linear_fast._statistics([(train, labels)])
    assert torch.allclose(mean, train.mean(dim=0), atol=1e-4)
    assert torch.allclose(deviation, train.std(dim=0, correction=0), rtol=1e-4)
    passes = [(((train - mean) / deviation).to(torch.bfloat16), labels)]
    pairs = list(itertools.product(linear_fast.RATES, linear_fast.DECAYS))
    table = linear_fast.sweep(passes, pairs, 5, 20, 100_000, 0)
    best = max(table, key=lambda pair: table[pair])
    weight, bias = linear_fast.train_heads(passes, [best], 5, 50, 0)
    correct = (((test - mean) / deviation) @ weight[0].T + bias[0]).argmax(dim=1) == true
    assert 0.5 < expected < 0.95
    assert abs(correct.double().mean().item() - expected) < 0.01


def test_heads_trained_in_parallel_equal_those_of_torchs_sgd() -> None:
    train, labels, _, _ = problem()
    passes, pairs = [(train / 5, labels)], [(0.1, 0.0), (0.02, 1e-2)]
    weights, biases = linear_fast.train_heads(passes, pairs, 5, 2, seed=3)
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
        assert torch.allclose(weights[number], head.weight, atol=1e-5)
        assert torch.allclose(biases[number], head.bias, atol=1e-5)


@pytest.mark.parametrize("passes", ["0", "2"])
def test_the_best_pair_of_the_sweep_is_used(encoder: Path, drawn: Path, passes: str) -> None:
    result = evaluate("linear", encoder, drawn, "--protocol", "fast", "--passes", passes, "--epochs", "5")
    assert len(result["sweep"]) == len(linear_fast.RATES) * len(linear_fast.DECAYS)
    best = max(result["sweep"], key=lambda row: row["held_back"])
    assert (result["settings"]["lr"], result["settings"]["weight_decay"]) == (best["lr"], best["decay"])
    assert result["images"] == 20


def _count_embedded(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> list[int]:
    """Return a list whose only number counts the batches embedded; interrupt instead of batch `stop_at`."""
    embed, calls = ClassificationEvaluation.embed, [0]

    def counted(self: ClassificationEvaluation, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(ClassificationEvaluation, "embed", counted)
    return calls


@pytest.mark.parametrize(("passes", "again"), [("2", 4 + 1), ("0", 4 + 1)])
def test_it_resumes_after_the_last_complete_pass(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, passes: str, again: int
) -> None:
    options = ["--protocol", "fast", "--passes", passes, "--epochs", "2", "--batch", "45"]  # four batches a pass
    undisturbed = evaluate("linear", encoder, drawn, *options)
    other = copy_of(encoder)
    with monkeypatch.context() as first:
        _count_embedded(first, stop_at=6 if passes == "2" else 3)
        with pytest.raises(KeyboardInterrupt):
            evaluate("linear", other, drawn, *options)
    calls = _count_embedded(monkeypatch)
    resumed = evaluate("linear", other, drawn, *options)
    assert calls[0] == again  # a pass, and the test images
    for key in ("per_class", "sweep", "settings"):
        assert resumed[key] == undisturbed[key]
    expected, files = (sorted((path.parent / "out" / "linear_fast").iterdir()) for path in (encoder, other))
    assert [path.name for path in expected] == [path.name for path in files]
    for left, right in zip(expected, files, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_a_cache_that_does_not_fit_is_recomputed(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = ["--protocol", "fast", "--passes", "0", "--epochs", "1"]
    evaluate("linear", encoder, drawn, *options)
    file = encoder.parent / "out" / "linear_fast" / "center.safetensors"
    intact, calls = file.read_bytes(), _count_embedded(monkeypatch)
    evaluate("linear", encoder, drawn, *options, "--lr", "0.1")
    assert calls[0] == 1  # the test images alone
    with safe_open(file, "pt") as opened:
        about, x, ids = opened.metadata(), opened.get_tensor("features"), opened.get_tensor("ids")
    others = [{"features": x, "ids": ids + 1}, {"features": x.float(), "ids": ids}, {"features": x[1:], "ids": ids}]
    for spoilt in (intact[:-9], b"", *(save(other, metadata=about) for other in (*others, {"ids": ids}))):
        file.write_bytes(spoilt)
        caplog.clear()
        evaluate("linear", encoder, drawn, *options)
        assert file.read_bytes() == intact
        assert "recomputing" in caplog.text
    evaluate("linear", encoder, drawn, *options, "--batch", "90")
    assert "cached with other settings" in caplog.text
    assert calls[0] == 1 + 6 * 2 + 3
