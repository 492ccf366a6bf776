"""Runs that are begun and killed, or fail to begin, leave nothing behind that grows: files, memory, processes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine.meeting import Told
from pipeline.errors import InputError
from tests.engine.test_stops import arguments_of, seconds_of

WARM = 5


def left(out: Path) -> dict[str, int]:
    """Count what a machine has of these runs."""
    folders = {"files": out, "/dev/shm": Path("/dev/shm"), "/tmp": Path("/tmp")}
    own = psutil.Process()
    running = [process for process in own.children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE]
    deep = out if out.exists() else None
    return {
        "files": sum(len(files) for _, _, files in os.walk(deep)) if deep else 0,
        **{name: len(os.listdir(folder)) for name, folder in folders.items() if name != "files"},
        "processes": len(running),
        "descriptors": own.num_fds(),
        "shared memory": psutil.virtual_memory().shared // 2**20,
    }


def slopes(counted: list[dict[str, int]]) -> dict[str, float]:
    """Return by how much each grows a cycle: the least over thirds, so that others' files do not count."""
    third = len(counted) // 3
    return {key: float(np.median([c[key] for c in counted[-third:]]) - np.median([c[key] for c in counted[:third]])) / third for key in counted[0]}


@pytest.mark.slow
@pytest.mark.reliability
def test_a_hundred_runs_that_are_killed_leave_nothing_that_grows(
    drawn: Path, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    out, draw, cycles = tmp_path / "out", random.Random(0), 100
    arguments = [*arguments_of(drawn, out), "--optim.epochs", "100000", "--save_every", "1", "--keep", "2"]
    arguments = [a for a in arguments if a != "3"]
    counted = []
    for number in range(WARM + cycles):
        seconds_of(arguments, kill_after=draw.uniform(0.2, 3.0))
        if number >= WARM:
            counted.append(left(out))
    found = slopes(counted)
    figure("100 start–kill cycles", f"{cycles} cycles: " + ", ".join(f"{k} {v:+.3f} a cycle" for k, v in found.items()))
    assert all(value <= 0.05 for key, value in found.items() if key != "/tmp"), (found, counted[0], counted[-1])
