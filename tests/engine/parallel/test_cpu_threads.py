"""On the CPU each rank computes with its share of the cores, unless the user has set OMP_NUM_THREADS."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.config.settings import Settings
from engine.parallel import cpu_threads, rendezvous
from engine.parallel.accelerator import build_accelerator
from engine.parallel.cpu_threads import Launcher, choose_threads, read_launcher
from tests import ROOT, processes
from tests.engine.test_run import LAUNCHER

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
LAUNCH = ["python", "accelerate", "launch", "engine/run.py", "--cpu"]


@pytest.mark.parametrize(
    ("environment", "launcher", "expected"),
    [
        (ACCELERATE, Launcher({}, LAUNCH), 4),  # the launcher's 1
        (TORCHRUN, Launcher({"PATH": "/bin"}, ["torchrun", "--nproc-per-node", "2"]), 4),
        (ACCELERATE | {"OMP_NUM_THREADS": "16"}, Launcher({}, LAUNCH), 4),  # a number of all physical cores
        (ACCELERATE, Launcher({"OMP_NUM_THREADS": "1"}, LAUNCH), None),  # the user's
        (TORCHRUN, Launcher({"OMP_NUM_THREADS": "1"}, ["torchrun"]), None),
        (ACCELERATE, Launcher({}, [*LAUNCH, "--num_cpu_threads_per_process", "1"]), None),
        (ACCELERATE, Launcher({}, [*LAUNCH, "--num-cpu-threads=1"]), None),
        (ACCELERATE, None, None),  # no /proc
        ({"OMP_NUM_THREADS": "1"}, Launcher({}, ["bash"]), None),  # OMP_NUM_THREADS=1 python engine/run.py
        ({}, Launcher({}, ["bash"]), 4),  # torch would take the whole machine
        ({"TORCHELASTIC_RUN_ID": "none"}, Launcher({}, ["torchrun"]), 4),  # torchrun sets nothing for one rank
    ],
)
def test_share_of_the_cores_replaces_the_launchers_number_and_not_the_users(
    environment: dict[str, str], launcher: Launcher | None, expected: int | None
) -> None:
    assert choose_threads(environment, launcher, share=4, default=8) == expected


def test_torch_may_use_fewer_threads_than_cores() -> None:
    """One a physical core, or MKL_NUM_THREADS."""
    assert choose_threads({}, None, share=8, default=4) == 4


def test_launchers_environment_is_that_of_its_start(tmp_path: Path) -> None:
    """The tests' server, the parent here, was started with OMP_NUM_THREADS, and this process without."""
    assert processes.call(_write_launcher, str(tmp_path / "launcher"), env={}).wait(60) == 0
    launcher = (tmp_path / "launcher").read_text().splitlines()
    assert launcher[0] == "1"
    assert "from tests import processes" in launcher[-1]


def _write_launcher(out: str) -> None:
    assert "OMP_NUM_THREADS" not in os.environ
    launcher = read_launcher()
    assert launcher is not None
    Path(out).write_text("\n".join([launcher.environment["OMP_NUM_THREADS"], *launcher.command]))


@pytest.mark.parametrize(("launched_with", "expected"), [({}, 3), ({"OMP_NUM_THREADS": "1"}, 1)])
def test_accelerator_computes_with_the_share_and_logs_it(
    launched_with: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in ACCELERATE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_threads, "read_launcher", lambda: Launcher(launched_with, LAUNCH))
    monkeypatch.setattr(rendezvous, "available_cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build_accelerator(Settings(cpu=True, tracker="none"))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    logged = "computing with 3 threads, not 1: this rank's share of the cores; set OMP_NUM_THREADS"
    assert (logged in caplog.text) == (expected == 3)


PROBE = """
import torch
from engine.config.settings import Settings
from engine.parallel import rendezvous
from engine.parallel.accelerator import build_accelerator
rendezvous.available_cores = lambda: 6
build_accelerator(Settings(cpu=True, tracker="none"))
print("threads", torch.get_num_threads(), flush=True)
"""
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "expected"),
    [
        (LAUNCHER, None, ["6"]),
        (LAUNCHER, "1", ["1"]),
        ((*LAUNCHER, "--num_cpu_threads_per_process", "2"), None, ["2"]),
        ((*LAUNCHER, "--multi_gpu", "--num_processes", "2"), None, ["3", "3"]),
        ((sys.executable, *TWO_RANKS), None, ["3", "3"]),
        ((sys.executable, *TWO_RANKS), "1", ["1", "1"]),
    ],
)
def test_launchers_threads(command: tuple[str, ...], number: str | None, expected: list[str], tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    environment.pop("OMP_NUM_THREADS", None)
    if number is not None:
        environment["OMP_NUM_THREADS"] = number
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("threads ")] == expected
