"""Hostile recipes and command lines are refused in one line: no code runs, no memory is allocated."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.config.cli import parse
from engine.config.settings import Data, Optim, Settings
from engine.optim.schedule import Schedule
from pipeline.system.errors import InputError
from tests.hostile import record, reliability, survived

DEEP = "[" * 60_000


@pytest.fixture
def owned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that hostile settings would create: `import planted` creates it."""
    target = tmp_path / "owned"
    (tmp_path / "planted.py").write_text(f"open({str(target)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield target
    sys.modules.pop("planted", None)


APPLY = "!!python/object/apply:os.system ['touch OWNED']"
RECIPES = [
    "data: planted.Thing",
    "data: {class_path: planted.Thing}",
    "data: {class_path: engine.config.Data, init_args: {train: x}, size: planted.Thing}",
    "data: {sizes: {class_path: planted.Thing}}",
    "model: {bn: {class_path: planted.Thing}}",
    "terms: {co2: {class_path: planted.Thing}}",
    "terms: {co2: planted.Thing}",
    "terms: [co2: {class_path: planted.Thing}]",
    "terms: planted.Thing",
    "data: /etc/hostname",
    f"optim: {{lr: {APPLY}}}",
    f"optim: {{lr: {APPLY!r}}}",
    "out: !!python/name:os.system ''",
    "seed: !!int 3",
    "data: &a {sizes: *a}",
    "seed: 1\nseed: 2",
    "optim: {lr: 1, lr: 2}",
    f"out: {DEEP}",
    f"optim: {{lr: '{DEEP}'}}",
    f"model: {{dim: '{DEEP}'}}",
    f"data: {{sizes: [['{DEEP}']]}}",
    "terms: {co2: {weight: '" + DEEP + "'}}",
    f"seed: {'9' * 400}",
    f"seed: 0x{'f' * 4000}",
    f"log_every: {'9' * 4000}",
    f"optim: {{lr: {'9' * 400}}}",
    f"optim: {{lr: {'9' * 60_000}}}",
    "data: {batch: 1000000000000}",
    "optim: {epochs: 1000000000000}",
    "model: {dim: 65536, hidden: 65536}\nmethod: {name: moco_v3}",
    "model: {dim: 65536}\nmethod: {queue: 16777216}",
    "collective_timeout: 1e300",
    "step_timeout: .inf",
    "knn: {k: 1000000000000}",
    f"allow_change: [{'x, ' * 2000}x]",
    'out: "a\\0b"',
    'data: {train: "a\\e[31mb"}',
    f"out: {'x' * 5000}",
    "config: other.yaml",
    "base: /dev/zero",
    "base: {class_path: planted.Thing}",
    "base: http://127.0.0.1:9/recipe.yaml",
    f"base: {DEEP}",
    f"base: {'../' * 5000}r.yaml",
    'base: "a\\0b"',
    "1: 2",
    "data: [1]",
    "terms: 5",
    "- " * 30_000,
    "\0",
    "x" * 70_000,
]


@reliability
def test_no_recipe_runs_code_or_allocates_memory(
    tmp_path: Path, owned: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.chdir(tmp_path)

    def one(number: int) -> None:
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(RECIPES[number].replace("OWNED", str(owned)))
        parse(["--config", str(recipe)])

    outcome = survived(one, len(RECIPES), seconds=30)
    record(record_property, f"{len(RECIPES)} hostile recipes: 0 executed, {outcome.kinds['refused']} refused")
    assert outcome.kinds == {"refused": len(RECIPES)}, outcome.messages
    assert all(len(line) < 6000 for line in outcome.messages)
    assert outcome.mebibytes < 300
    assert not owned.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "planted.Thing"],
        ["--data=planted.Thing"],
        ["--data", '{"class_path": "planted.Thing"}'],
        ["--data", "recipe.yaml"],
        ["--data.class_path", "planted.Thing"],
        ["--optim+", "planted.Thing"],
        ["--terms.co2", "planted.Thing"],
        ["--terms.co2", '{"class_path": "planted.Thing"}'],
        ["--terms.co2", "/dev/zero"],
        ["--terms.co2.class_path", "planted.Thing"],
        ["--terms.co2.class_path=planted.Thing"],
        ["--config", "{data: planted.Thing}"],
        ["--config", "http://127.0.0.1:9/recipe.yaml"],
        ["--config", "memory://recipe.yaml"],
        ["--config", "/dev/zero"],
        ["--config"],
        ["--optim.lr", APPLY],
        ["--out", "a\0b"],
        ["--log_every", "9" * 4000],
        ["--log_every", "9" * 5000],
        ["--optim.lr", DEEP],
        ["--seed", DEEP],
        ["--terms", DEEP],
        ["--allow-change", "9" * 60_000],
        ["--data.sizes", "[" + "224, " * 2000 + "224]"],
        ["--data.train", "a\udcffb"],
        ["--" + "x." * 20_000, "3"],
    ],
)
def test_no_argument_runs_code_or_reads_files(arguments: list[str], owned: Path) -> None:
    words = [argument.replace("OWNED", str(owned)) for argument in arguments]
    outcome = survived(lambda _: parse(words), seconds=30)
    assert outcome.kinds == {"refused": 1}, outcome
    assert not owned.exists()


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    outcome = survived(lambda _: parse(["--config", str(tmp_path / "pipe.yaml")]), seconds=10)
    assert outcome.kinds == {"refused": 1}, outcome


def test_later_recipes_and_then_options_override(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("\ufeffoptim: {lr: 0.5, epochs: 7}\nterms: {co2: {weight: 2}}\nmodel:\n")
    second.write_text("optim: {lr: 0.25}\nterms: {residual: {}}\nout: 2001-01-01\n")
    settings = parse(
        ["--optim.clip_grad_norm", "2", "--config", str(first), f"--config={second}", "--terms.co2.temperature", "0.5"]
    )
    optim = settings.optim
    assert (optim.lr, optim.epochs, optim.clip_grad_norm, settings.out) == (0.25, 7, 2, "2001-01-01")
    assert settings.terms.co2 is not None
    assert (settings.terms.co2.weight, settings.terms.co2.temperature) == (2, 0.5)
    assert settings.terms.residual is not None


def test_too_many_steps_for_a_schedule_are_refused() -> None:
    settings = Settings(data=Data(batch=2), optim=Optim(epochs=100_000))
    with pytest.raises(InputError, match=r"optim\.epochs 100000: 64000000000 steps in all, at most"):
        Schedule(settings, 640_000, torch.device("cpu"))
