"""A process that takes no more steps ends in time, and prints where it is."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from engine.checkpoint import storage
from tests import ROOT, processes
from tests.conftest import Figure
from tests.engine.test_run import ENVIRONMENT, SMALL

START = """
import ctypes, sys, time
from engine.fault_tolerance.watchdog import Watchdog
watchdog = Watchdog({limit})
for step in range(5):
    watchdog.beat(step)
    time.sleep(0.05)
print("stuck", flush=True)
"""


def run(limit: float, code: str) -> tuple[int | None, float, str]:
    """Run five steps, then `code`; return exit status, seconds since the last step, and stderr."""
    script = START.format(limit=limit) + code
    started = processes.Process([sys.executable, "-c", script], ENVIRONMENT, ROOT)
    started.wait_for_line("stuck")
    since = time.monotonic()
    _, err = started.communicate(timeout=60)
    return started.returncode, time.monotonic() - since, err


@pytest.mark.reliability
def test_stall_ends_the_process_with_all_stacks_at_the_limit(figure: Figure) -> None:
    status, seconds, err = run(4.0, "def wait_forever():\n    time.sleep(1000)\nwait_forever()")
    figure("loader worker raises; loader stalls", f"watchdog of 4 s: ended after {seconds:.2f} s, with all stacks")
    assert status == 1
    assert "step 4: no step for 4." in err
    assert "wait_forever" in err
    assert seconds == pytest.approx(4.0, rel=0.1)


STALL = """
import sys, threading
import engine.run
from engine.training import loop
from pipeline.backends.ffcv import FfcvBackend
step, fill, stalls = loop.train_on, FfcvBackend._fill, threading.Event()
def train_on(run, *rest, **options):
    step(run, *rest, **options)
    if run.done == 7:
        stalls.set()
def dead_disk(*rest):
    stalls.wait(0) and threading.Event().wait(1000)
    return fill(*rest)
loop.train_on, FfcvBackend._fill = train_on, dead_disk
engine.run.main()
"""


@pytest.mark.reliability
def test_stalled_loader_ends_the_run_with_rank_step_and_all_stacks(drawn: Path, tmp_path: Path, figure: Figure) -> None:
    arguments = ["--data.train", str(drawn), *SMALL, "--optim.epochs", "100", "--data.stall_timeout", "2.5"]
    command = [sys.executable, "-c", STALL, *arguments, "--out", str(tmp_path), "--save_every", "1"]
    ended = processes.run(command, ENVIRONMENT, ROOT, timeout=120)
    assert ended.returncode == 1, ended.stderr
    *_, message = ended.stderr.splitlines()
    match = re.match(r"error: rank 0 on \S+, step (\d+): .*: no batch for 2\.5 s \(samples \d+ ", message)
    assert match, ended.stderr
    assert 7 <= int(match[1]) <= 7 + 4  # batches ahead
    main, _, threads = ended.stderr.partition("most recent call first")
    assert "in _train_epochs" in main
    assert "in dead_disk" in threads
    assert storage.newest(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints" / f"step_{int(match[1]):08d}"
    figure("loader worker raises; loader stalls", "in a run: rank, step and all stacks, the last step saved")


def test_process_that_holds_the_interpreter_ends_too() -> None:
    status, seconds, err = run(1.0, "ctypes.PyDLL(None).sleep(1000)")
    assert status == 1
    assert "most recent call first" in err
    assert seconds < 9


def test_pauses_and_the_time_before_the_first_step_do_not_count() -> None:
    code = """
with watchdog.paused():
    time.sleep(1.5)
watchdog.close()
time.sleep(1.5)
late = Watchdog(0.5)
time.sleep(1.5)
late.close()
Watchdog(0).close()
"""
    assert run(0.5, code)[0] == 0
