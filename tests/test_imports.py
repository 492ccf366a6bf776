"""The tree's layering: which package may import which, no import circles, no hidden modules, no import needs a GPU."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
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


_MODULES = {_module(file): file for package in _PACKAGES[:-1] for file in _files(package)}


def _imported(source: str, package: str) -> set[str]:
    """Dotted names that `source`, a file of `package`, imports anywhere, also by name through importlib."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            parts = [part for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant)]
            names |= {part.value for part in parts if isinstance(part.value, str)}
    return names


def _imports_of(file: Path) -> set[str]:
    return _imported(file.read_text(), ".".join(file.relative_to(ROOT).parent.parts))


def _packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import engine.loop", "engine.loop"),
        ("import os, engine", "engine"),
        ("from engine import loop", "engine.loop"),
        ("from engine.training.loop import train", "engine.training.loop.train"),
        ("def f():\n    from engine import loop", "engine.loop"),
        ("import importlib\nimportlib.import_module('engine.loop')", "engine.loop"),
        ("import importlib\nimportlib.import_module(f'engine.{x}')", "engine."),
        ("__import__('engine')", "engine"),
        ("from . import views", "pipeline.backends.views"),
        ("from ..augment import augment", "pipeline.augment.augment"),
    ],
)
def test_every_kind_of_import_is_found(source: str, name: str) -> None:
    assert name in _imported(source, "pipeline.backends")


def test_every_package_has_files() -> None:
    assert all(_files(package) for package in _PACKAGES)


@pytest.mark.parametrize(
    "file", [f for package in _FORBIDDEN for f in _files(package)], ids=lambda f: str(f.relative_to(ROOT))
)
def test_packages_import_only_those_before_them(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    assert not _packages(_imports_of(file)) & _FORBIDDEN[package]


def _folders(modules: dict[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """Return the graph of imports between the files and sub-folders of each folder; the project's is ""."""
    folders: dict[str, dict[str, set[str]]] = {}
    for module, targets in modules.items():
        for target in targets:
            above, below = module.split("."), target.split(".")
            pairs = enumerate(zip(above, below, strict=False))
            depth = next((depth for depth, (one, other) in pairs if one != other), None)
            if depth is not None:  # None: one is the package of the other
                graph = folders.setdefault(".".join(above[:depth]), {})
                graph.setdefault(above[depth], set()).add(below[depth])
    return folders


def _circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.mark.parametrize(
    ("modules", "folder"),
    [
        ({"a.x.m": {"a.y.n"}, "a.y.o": {"a.x.p"}}, "a"),
        ({"a.b.x.m": {"a.b.y.n"}, "a.b.y.o": {"a.b.x.p"}}, "a.b"),
        ({"a.b.m": {"a.b.x.n"}, "a.b.x.o": {"a.b.m"}}, "a.b"),
        ({"a.x": {"b.y"}, "b.z": {"a.w"}}, ""),
        ({"a.x.m": {"a.y.n"}, "a.y.n": {"a.z"}, "a.w": {"a.x.m"}}, None),
    ],
)
def test_circles_are_found_at_every_depth(modules: dict[str, set[str]], folder: str | None) -> None:
    circles = [name for name, graph in _folders(modules).items() if _circle(graph)]
    assert circles == ([] if folder is None else [folder])


def test_neither_modules_nor_folders_import_in_circles() -> None:
    modules = {
        module: {part for name in _imports_of(file) for part in (name, name.rpartition(".")[0])} & {*_MODULES}
        for module, file in _MODULES.items()
    }
    assert sum(map(len, modules.values())) > len(modules)
    assert not _circle({module: targets - {module} for module, targets in modules.items()})
    folders = _folders(modules)
    assert {"", "engine", "engine.evaluate", "engine.evaluate.detection"} <= folders.keys()
    assert not {name: circle for name, graph in folders.items() if (circle := _circle(graph))}


@pytest.fixture(scope="module")
def foreign() -> frozenset[str]:
    """Names of all modules outside this project."""
    imported = set().union(*(_packages(_imports_of(f)) for package in _PACKAGES for f in _files(package)))
    return sys.stdlib_module_names | (imported - set(_PACKAGES)) | _DEPENDENCIES


@pytest.mark.parametrize("file", _files("engine"), ids=lambda f: f.name)
def test_no_file_of_engine_hides_another_module(file: Path, foreign: frozenset[str]) -> None:
    """The script engine/run.py has its own folder, of these files and packages, first on the search path."""
    assert file.relative_to(ROOT / "engine").with_suffix("").parts[0] not in foreign


def test_every_module_imports_without_a_gpu() -> None:
    code = f"""
import importlib, traceback, torch
failed = 0
for name in {[name for name in _MODULES if not name.endswith("__main__")]!r}:
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
