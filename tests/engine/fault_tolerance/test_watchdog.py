"""A process in which nothing goes on any more ends by itself, in time, and says where it stood."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.checkpoint import storage
from tests.conftest import Figure
from tests.engine.test_run import ENVIRONMENT, ROOT, SMALL

BEGIN = """
import ctypes, sys, time
from engine.fault_tolerance.watchdog import Watchdog
watchdog = Watchdog({limit})
for step in range(5):
    watchdog.beat(step)
    time.sleep(0.05)
print("stuck", flush=True)
"""


def stuck(limit: float, how: str) -> tuple[int | None, float, str]:
    """Run until it ends; return exit status, seconds from the last step, and what it said."""
    script = BEGIN.format(limit=limit) + how
    started = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "stuck\n"
    since = time.monotonic()
    _, err = started.communicate(timeout=60)
    return started.returncode, time.monotonic() - since, err


@pytest.mark.reliability
def test_a_stall_ends_the_process_with_all_stacks_at_the_limit(figure: Figure) -> None:
    status, took, err = stuck(4.0, "def waits_for_ever():\n    time.sleep(1000)\nwaits_for_ever()")
    figure("loader worker raises; loader stalls", f"watchdog of 4 s: ended after {took:.2f} s, with all stacks")
    assert status == 1
    assert "step 4: no step for 4." in err
    assert "waits_for_ever" in err
    assert took == pytest.approx(4.0, rel=0.1)


STALL = """
import sys, threading
import engine.run
from engine.training import loop
from pipeline.backends.ffcv import FfcvBackend
step, crop, stalls = loop.train_on, FfcvBackend._crop, threading.Event()
def trained(run, *rest, **options):
    step(run, *rest, **options)
    if run.done == 7:
        stalls.set()
def a_disk_that_is_dead(*rest):
    stalls.wait(0) and threading.Event().wait(1000)
    return crop(*rest)
loop.train_on, FfcvBackend._crop = trained, a_disk_that_is_dead
engine.run.main()
"""


@pytest.mark.reliability
def test_a_loader_that_stalls_ends_the_run_with_rank_step_and_all_stacks(
    drawn: Path, tmp_path: Path, figure: Figure
) -> None:
    arguments = ["--data.train", str(drawn), *SMALL, "--optim.epochs", "100", "--data.stall_timeout", "2.5"]
    ended = subprocess.run(
        [sys.executable, "-c", STALL, *arguments, "--out", str(tmp_path), "--save_every", "1"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1, ended.stderr
    *_, said = ended.stderr.splitlines()
    found = re.match(r"error: process 0 on \S+, step (\d+): .*: no batch for 2\.5 s \(samples \d+ ", said)
    assert found, ended.stderr
    assert 7 <= int(found[1]) <= 7 + 4  # batches ahead
    own, _, threads = ended.stderr.partition("most recent call first")
    assert "in _epochs" in own
    assert "in a_disk_that_is_dead" in threads
    assert storage.newest(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / f"step_{int(found[1]):08d}"
    figure("loader worker raises; loader stalls", "in a run: rank, step and all stacks, the last step saved")


def test_a_process_that_holds_the_interpreter_is_ended_too() -> None:
    status, took, err = stuck(1.0, "ctypes.PyDLL(None).sleep(1000)")
    assert status == 1
    assert "most recent call first" in err
    assert took < 9


def test_pauses_and_the_time_before_the_first_step_do_not_count() -> None:
    calm = """
with watchdog.paused():
    time.sleep(1.5)
watchdog.close()
time.sleep(1.5)
late = Watchdog(0.5)
time.sleep(1.5)
late.close()
Watchdog(0).close()
"""
    assert stuck(0.5, calm)[0] == 0
