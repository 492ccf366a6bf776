"""On the CPU each rank computes with its share of the cores, unless the user has set OMP_NUM_THREADS."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from engine.parallel.cpu_threads import Launcher, choose_threads, read_launcher
from tests import ROOT, processes

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
