"""Tests of the shared cache: variants of compiled functions stay apart, and stale code is not loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.native import numba_cache
from pipeline.native.numba_cache import _imported_sources, compiled
from tests import ROOT, processes

SCRIPT = """
import sys
from pipeline.native.numba_cache import compiled

def adds(number):
    def add(x):
        return x + number
    add.__qualname__ = f"add{number}"
    return compiled(nogil=True)(add)

one, two = adds(1), adds(2)

@compiled(nogil=True)
def both(x):
    return one(x) * 100 + two(x)

print({"one": one, "two": two, "both": both}[sys.argv[1]](0))
"""
RACE = """
import sys, time
from numba.core.caching import IndexDataCacheFile
from pipeline.native.numba_cache import compiled

# Both find an empty cache; the second writes the index last, and its code first.
index, code, first = IndexDataCacheFile._save_index, IndexDataCacheFile._save_data, sys.argv[1:] == ["1"]
IndexDataCacheFile._save_index = lambda *arguments: (time.sleep(1.5 if first else 2.0), index(*arguments))
IndexDataCacheFile._save_data = lambda *arguments: (time.sleep(1.5 if first else 0.0), code(*arguments))

@compiled(nogil=True)
def half(x):
    return x / 2

print(*[half({"1": 3, "2": 5.0}[which]) for which in sys.argv[1:]])
"""


def output(script: Path, cache: Path, *arguments: str) -> str:
    done = processes.run([sys.executable, str(script), *arguments], environment(cache), timeout=60)
    assert not done.returncode, done.stderr
    return done.stdout


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


def test_variants_compiled_by_different_processes_stay_apart(tmp_path: Path) -> None:
    script = tmp_path / "variants.py"
    script.write_text(SCRIPT)
    assert [output(script, tmp_path, which) for which in ("one", "two", "both", "both")] == [
        "1\n",
        "2\n",
        *["102\n"] * 2,
    ]


def test_variants_without_a_unique_name_are_refused() -> None:
    with pytest.raises(ValueError, match="set its __qualname__"):
        compiled(nogil=True)(lambda x: x)


@pytest.mark.slow
def test_types_compiled_at_once_stay_apart(tmp_path: Path) -> None:
    script = tmp_path / "halves.py"
    script.write_text(RACE)
    both = [subprocess.Popen([sys.executable, str(script), which], env=environment(tmp_path)) for which in "12"]
    assert [process.wait(60) for process in both] == [0, 0]
    assert output(script, tmp_path, "1", "2") == "1.5 2.5\n"


def test_a_changed_source_is_compiled_again(tmp_path: Path) -> None:
    script = tmp_path / "variants.py"
    for number in (3, 4):
        script.write_text(SCRIPT.replace("x + number", f"x + number * {number}"))
        os.utime(script, (1e9, 1e9))  # same time and size
        assert output(script, tmp_path, "one") == f"{number}\n"


def test_sources_are_all_imported_modules() -> None:
    package = ROOT / "pipeline"
    sources = {path.relative_to(package).as_posix() for path in _imported_sources(package / "backends" / "ffcv.py")}
    assert {"augment/resize.py", "storage/decode.py", "native/libffcv.py", "system/limits.py"} <= sources
    assert not {"prepare.py", "doctor.py", "sources/archives.py"} & sources


@pytest.mark.parametrize(
    "line",
    [
        "import pipeline.native.inner",
        "import numpy, pipeline.native.inner as inner",
        "from pipeline.native import inner",
        "from pipeline.native.inner import *",
        "from . import inner",
        "from .inner import one",
        "from ..native import inner",
        "from ..native.inner import one",
        "def f():\n    from .inner import one",
        "from pipeline import native",
        "import pipeline.native",
    ],
)
def test_every_kind_of_import_is_followed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two by the `__init__.py` of the package."""
    package = tmp_path / "pipeline"
    (package / "native").mkdir(parents=True)
    for name, text in (("outer", line), ("inner", ""), ("__init__", "from pipeline.native.inner import one")):
        (package / "native" / f"{name}.py").write_text(text)
    monkeypatch.setattr(numba_cache, "_PACKAGE", package)
    sources = numba_cache._imported_sources(package / "native" / "outer.py")
    assert {package / "native" / "inner.py", package / "native" / "__init__.py"} <= sources


@pytest.mark.parametrize("changed", ["native/inner.py", "constants.py"])
def test_a_changed_import_compiles_a_module_again(changed: str, tmp_path: Path) -> None:
    """A callee in another folder, and a constant of the callee's module."""
    package = tmp_path / "pipeline"
    shutil.copytree(ROOT / "pipeline", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "constants.py").write_text("FACTOR = 10\n")
    inner = (
        "from pipeline import constants\nfrom pipeline.native.numba_cache import compiled\nFACTOR = constants.FACTOR\n"
    )
    inner += "@compiled()\ndef inner(x):\n    return FACTOR * x + 1\n"
    outer = "from pipeline.native.inner import inner\nfrom pipeline.native.numba_cache import compiled\n"
    outer += "@compiled()\ndef outer(x):\n    return inner(x)\n"
    (package / "native" / "inner.py").write_text(inner)
    (package / "augment" / "outer.py").write_text(outer)
    script = tmp_path / "call.py"
    script.write_text("from pipeline.augment.outer import outer\nprint(outer(1))\n")
    set_up = environment(tmp_path / "cache") | {"PYTHONPATH": str(tmp_path)}

    def call() -> str:
        return subprocess.run(
            [sys.executable, str(script)], env=set_up, capture_output=True, text=True, check=True
        ).stdout

    assert call() == "11\n"
    path = package / changed
    path.write_text(path.read_text().replace("+ 1", "+ 2").replace("FACTOR = 10", "FACTOR = 11"))
    assert call() == "12\n"


FIRST_BATCHES = """
import sys
from numba.core import event
from pipeline.beton import Beton
from pipeline.loader import Loader
from pipeline.views import AUGMENTATIONS

with event.install_recorder("numba:compile") as compiled:
    for backend in ("ffcv", "resident"):
        loader = Loader(Beton(sys.argv[1]), AUGMENTATIONS["moco_v2"], size=16, batch=8, workers=1, backend=backend)
        next(iter(loader))
        loader.close()
print(len(compiled.buffer))
"""


def test_a_second_process_compiles_nothing(drawn: Path, tmp_path: Path) -> None:
    script = tmp_path / "batches.py"
    script.write_text(FIRST_BATCHES)
    for _ in range(2):
        done = processes.run([sys.executable, str(script), str(drawn)])
        assert not done.returncode, done.stderr
    assert done.stdout == "0\n"
