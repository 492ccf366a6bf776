"""Every recipe builds and takes a step; what a dry run says is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from engine.config import parse
from engine.dryrun import dry_run

RECIPES = sorted((Path(__file__).parents[2] / "engine" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    settings = parse(["--config", str(recipe), "--cpu", "true"])
    found = dry_run(settings)
    shown = capsys.readouterr().out
    assert found["trained"] > 1e5
    assert found["flops_a_pair"] > 1e7
    assert found["steps"] == found["steps_an_epoch"] * settings.optim.epochs
    assert f"{found['steps']:,}" in shown
    assert all(size > 0 for size in found["memory"].values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_paper_command_and_result(recipe: Path) -> None:
    head = re.match(r"(#[^\n]*\n)+", recipe.read_text())
    assert head
    assert f"engine/recipes/{recipe.name}" in head[0]
    assert "arxiv.org/abs/" in head[0] or recipe.stem.endswith("_cpu")
    assert re.search(r"Published|Expected|Measured|Not measured yet", head[0])
    assert f"out: runs/{recipe.stem}\n" in recipe.read_text()
