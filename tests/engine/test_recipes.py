"""Every recipe is what it was, builds and takes a step; the numbers of a dry run are right."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import engine.run
import engine.training.dry_run
from engine.config.cli import flat, parse
from engine.training.dry_run import dry_run, estimate
from pipeline.system.errors import InputError
from tests import ROOT

RECIPES = sorted((ROOT / "engine" / "recipes").glob("*.yaml"))
RESOLVED = json.loads(Path(__file__).with_name("recipes.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_resolved_settings_are_unchanged(recipe: Path) -> None:
    """recipes.json: the defaults, and each recipe's settings that differ from them."""
    expected = RESOLVED["defaults"] | RESOLVED[recipe.stem]
    settings = flat(parse(["--config", str(recipe)]).as_dict())
    assert {key: value for key, value in settings.items() if value is not None} == {
        key: value for key, value in expected.items() if value is not None
    }


def _repeated() -> set[str]:
    """Return recipes whose method, model and size are another's, and the largest: their dry runs are slow tests.

    moco_v2_in1k's is `test_dry_run_of_moco_v2_has_the_known_numbers`.
    """
    first: dict[str, str] = {}
    for path in sorted(RECIPES, key=lambda path: path.stem != "moco_v2_in1k"):
        settings = parse(["--config", str(path)])
        first.setdefault(f"{settings.method} {settings.model} {settings.data.size}", path.stem)
    return {path.stem for path in RECIPES} - set(first.values()) | {"moco_v2_in1k", "moco_v3_vit_base_in1k"}


_LARGE = {"byol_in1k", "moco_v1_co2_in1k", "moco_v3_in1k", "moco_v3_vit_small_in1k", "simclr_in1k"}
_SLOW = _repeated() | _LARGE  # the recipes for CIFAR-10 have the same methods


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in _SLOW), id=path.stem) for path in RECIPES],
)
def test_every_recipe_passes_a_dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    settings = parse(["--config", str(recipe), "--cpu", "true"])
    estimates = dry_run(settings)
    shown = capsys.readouterr().out
    assert estimates["trained"] > 1e5
    assert estimates["flops_a_pair"] > 1e7
    assert estimates["steps"] == estimates["steps_an_epoch"] * settings.optim.epochs
    assert f"{estimates['steps']:,}" in shown
    assert all(size > 0 for size in estimates["memory"].values())
    assert torch.get_num_threads() == threads


def test_dry_run_of_moco_v2_has_the_known_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """ResNet-50's parameters and operations (He et al.: 4.1 G multiply-adds an image), four passes a pair."""
    estimates = dry_run(parse(["--config", str(RECIPES[0].with_name("moco_v2_in1k.yaml")), "--cpu", "true"]))
    parameters = 23_508_032 + 2048 * 2048 + 2048 + 2048 * 128 + 128
    assert (estimates["backbone"], estimates["trained"]) == (23_508_032, parameters)
    assert estimates["flops_a_pair"] == pytest.approx(4 * 2 * 4.09e9, rel=0.02)
    held = 4 * (4 * parameters + 65536 * 128)  # weights, momentum weights, gradients, momentum of the optimizer
    batch = 256 * (estimates["activation_bytes_a_pair"] + 2 * 4 * 3 * 224**2)
    assert estimates["memory"][1] == pytest.approx(held + batch, rel=0.02)
    assert estimates["memory"][8] == pytest.approx(held + batch / 8, rel=0.1)
    # 11 M outputs of convolutions, twice, in bf16
    assert 30 * 2**20 < estimates["activation_bytes_a_pair"] < 60 * 2**20
    assert (estimates["steps_an_epoch"], estimates["steps"]) == (5004, 1_000_800)
    assert "32.5" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["resnet18", pytest.param("vit_small", marks=pytest.mark.slow)])
def test_estimate_is_the_same_with_computed_products(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--method.name", "moco_v3", "--model.arch", arch, "--data.size", "32", "--data.samples", "1000"]
    zeros = estimate(parse([*settings, "--cpu"]))
    monkeypatch.setattr(engine.training.dry_run, "ZeroMatmuls", contextlib.nullcontext)
    computed = estimate(parse([*settings, "--cpu"]))
    assert zeros == computed
    assert computed["activation_bytes_a_pair"] > 1e4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.samples", "100", "--data.batch", "128"], "more than the 100 images"),
        (["--gradient_accumulation_steps", "3"], "gradient_accumulation_steps 3"),
        (["--data.train", "nowhere.beton"], "no such file"),
    ],
)
def test_dry_run_refuses_what_a_run_refuses(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        dry_run(parse([*arguments, "--cpu", "true"]))


def test_dry_run_needs_no_data_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model.arch", "resnet18", "--model.stem", "small", "--model.width", "0.125", "--data.size", "16"]
    monkeypatch.setattr(sys, "argv", ["run.py", *small, "--cpu", "true", "--dry-run", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        engine.run.main()
    assert not ended.value.code
    assert "unknown: give --data.train" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_open_with_paper_command_and_result(recipe: Path) -> None:
    head = re.match(r"(#[^\n]*\n)+", recipe.read_text())
    assert head
    assert f"engine/recipes/{recipe.name}" in head[0]
    assert "arxiv.org/abs/" in head[0]
    assert re.search(r"Published|Expected|Measured|Not measured yet", head[0])
    assert f"out: runs/{recipe.stem}\n" in recipe.read_text()
