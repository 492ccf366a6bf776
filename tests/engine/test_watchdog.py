"""A process in which nothing goes on any more ends by itself, in time, and says where it stood."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.conftest import Figure
from tests.engine.test_run import ENVIRONMENT, ROOT

BEGIN = """
import ctypes, sys, time
from engine.watchdog import Watchdog
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
