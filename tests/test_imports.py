"""Tests of the tree's layering: who imports whom, what files may be called, and that no import needs a GPU."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

_PACKAGES = ("pipeline", "methods", "engine", "benchmarks", "tests")
_FORBIDDEN = {
    "pipeline": {"methods", "engine", "benchmarks", "tests"},
    "methods": {"pipeline", "engine", "benchmarks", "tests"},
    "engine": {"benchmarks", "tests"},
}
_DEPENDENCIES = {"PIL", "accelerate", "ffcv", "matplotlib", "numba", "numpy", "nvidia", "tensorboard", "torch", "yaml"}


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(source: str, package: str) -> set[str]:
    """The top-level names that `source`, a file of `package`, imports anywhere, by name through importlib too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            names.add(".".join([*above, node.module or ""]).split(".")[0])
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            parts = [part for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant)]
            names |= {part.value.split(".")[0] for part in parts if isinstance(part.value, str)}
    return names


def _imports_of(file: Path) -> set[str]:
    return _imported(file.read_text(), ".".join(file.relative_to(ROOT).parent.parts))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import engine.loop", "engine"),
        ("import os, engine", "engine"),
        ("from engine import loop", "engine"),
        ("from engine.training.loop import train", "engine"),
        ("def f():\n    from engine import loop", "engine"),
        ("import importlib\nimportlib.import_module('engine.loop')", "engine"),
        ("import importlib\nimportlib.import_module(f'engine.{x}')", "engine"),
        ("__import__('engine')", "engine"),
        ("from . import views", "pipeline"),
        ("from ..augment import augment", "pipeline"),
    ],
)
def test_every_way_to_import_is_seen(source: str, name: str) -> None:
    assert name in _imported(source, "pipeline.backends")


def test_every_package_was_found() -> None:
    assert all(_files(package) for package in _PACKAGES)


@pytest.mark.parametrize(
    "file", [f for package in _FORBIDDEN for f in _files(package)], ids=lambda f: str(f.relative_to(ROOT))
)
def test_imports_point_from_pipeline_and_methods_to_engine_to_benchmarks_and_tests(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    assert not _imports_of(file) & _FORBIDDEN[package]


@pytest.fixture(scope="module")
def taken() -> frozenset[str]:
    """The names of all modules that are not ours."""
    outside = set().union(*(_imports_of(f) for package in _PACKAGES for f in _files(package))) - set(_PACKAGES)
    return sys.stdlib_module_names | outside | _DEPENDENCIES


@pytest.mark.parametrize("file", _files("engine"), ids=lambda f: f.name)
def test_no_file_of_the_engine_hides_another_module(file: Path, taken: frozenset[str]) -> None:
    """Run as a script, engine/run.py has its own folder first on the search path."""
    assert file.stem not in taken
    assert not any(part in taken for part in file.relative_to(ROOT / "engine").parts[:-1])


def test_every_module_can_be_imported_without_a_gpu() -> None:
    modules = [_module(file) for package in _PACKAGES[:-1] for file in _files(package)]
    code = f"""
import importlib, traceback, torch
failed = 0
for name in {[name for name in modules if not name.endswith("__main__")]!r}:
    try:
        importlib.import_module(name)
    except BaseException:
        failed += 1
        print(name, traceback.format_exc())
assert not torch.cuda.is_initialized()
raise SystemExit(failed)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
