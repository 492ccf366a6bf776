"""The launcher's setup, with a Python that records installations instead of making them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

FILES = ("millrace", "constraints.txt", "pyproject.toml", "pipeline/native/jpeg.c")
PYTHON = f"""#!/bin/bash
case "$*" in
    *"-m pip install"*) echo "$@" >>"$NOTED"; case "$*" in *"$FAILS"*) exit 1 ;; esac ;;
    *"-m pip list"*) printf 'torch==2.12.0+cu129\\nnvidia-nccl-cu12==2.1\\nnumpy==2.1\\nrich==13.0\\n' ;;
    *"-m venv"*) echo "$@" >>"$NOTED"; mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
    "-m pip --version") ;;
    "-c import ffcv") ;;
    "-") [[ $(cat) != *torch.version.cuda* ]] || printf '.[cu12]' ;;
    *"sys.executable"*|*"sys._base_executable"*) printf '%s\\n' "$0" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what setup reads, and a Python in front of all others."""
    for name in FILES:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    for name in ("python3", "python3.11"):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(PYTHON)
        file.chmod(0o755)
    return tmp_path / "clone"


def _run(clone: Path, *words: str, fails: str = "nothing", **environment: str) -> subprocess.CompletedProcess[str]:
    noted = clone.parent / "noted"
    noted.unlink(missing_ok=True)
    path = {"PATH": f"{clone.parent / 'bin'}:{os.environ['PATH']}", "NOTED": str(noted), "FAILS": fails}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MILLRACE")}
    command = [str(clone / "millrace"), *words]
    return subprocess.run(command, env=kept | path | environment, capture_output=True, text=True)


def _noted(clone: Path) -> list[str]:
    noted = clone.parent / "noted"
    return noted.read_text().splitlines() if noted.exists() else []


def test_a_new_environment_has_the_exact_versions_and_is_made_once(clone: Path) -> None:
    done = _run(clone, "setup")
    assert done.returncode == 0, done.stderr
    venv, install = _noted(clone)
    assert venv == f"-m venv {clone / '.venv'}"
    assert install.endswith("-c constraints.txt -e .[cu13,ffcv,test]")
    assert _run(clone, "setup").returncode == 0
    assert _noted(clone) == []


def test_the_environment_may_be_elsewhere_but_not_in_a_folder_of_something_else(clone: Path) -> None:
    other = clone.parent / "other"
    assert _run(clone, "setup", MILLRACE_VENV=str(other)).returncode == 0
    assert (other / "bin/python").exists()
    assert not (clone / ".venv").exists()
    used = clone.parent / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("years of work")
    (used / "setup.log").touch()
    refused = _run(clone, "setup", MILLRACE_VENV=str(used))
    assert refused.returncode == 2
    assert f"{used} is a folder of something else: name a new one" in refused.stderr
    assert (used / "thesis.tex").read_text() == "years of work"
    assert _noted(clone) == []


def test_an_environment_of_another_program_is_used_and_never_deleted(clone: Path) -> None:
    other = clone / ".venv"
    (other / "bin").mkdir(parents=True)
    (other / "pyvenv.cfg").touch()
    shutil.copy(clone.parent / "bin/python3", other / "bin/python")
    assert _run(clone, "setup").returncode == 0
    assert len(_noted(clone)) == 1  # pip alone
    (other / "millrace.stamp").unlink()
    (other / "bin/python").unlink()
    refused = _run(clone, "setup")
    assert refused.returncode == 2
    assert "another program's environment" in refused.stderr
    assert (other / "pyvenv.cfg").exists()


def test_the_present_environment_keeps_its_torch(clone: Path) -> None:
    done = _run(clone, "--system", "setup")
    assert done.returncode == 0, done.stderr
    install, ffcv = _noted(clone)
    kept = clone / ".system/present.txt"
    assert install.endswith(f"-c {kept} -e .[cu12]")
    assert kept.read_text().split() == ["torch==2.12.0+cu129", "nvidia-nccl-cu12==2.1", "numpy==2.1"]
    assert ffcv.endswith("-e .[ffcv]")
    assert not (clone / ".venv").exists()
    assert _run(clone, "--system", "setup").returncode == 0
    assert _noted(clone) == []


def test_the_present_environment_may_lack_ffcv_and_no_other_package(clone: Path) -> None:
    done = _run(clone, "--system", "setup", fails=".[ffcv]")
    assert done.returncode == 0
    assert "FFCV could not be built, and is left out" in done.stderr
    (clone / ".system/millrace.stamp").unlink()
    done = _run(clone, "--system", "setup", fails="-e .")
    assert done.returncode == 1
    assert "pip could not install the packages" in done.stderr
    assert not (clone / ".system/millrace.stamp").exists()


def test_the_container_is_set_up_by_the_launcher() -> None:
    lines = (ROOT / "engine/launch/Dockerfile").read_text().splitlines()
    (step,) = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    assert all(part.split()[0] == "./millrace" for part in step.split(" && "))
