"""A rank that waits for a lost one where Python cannot interrupt it ends all the same, and names the lost one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import processes
from tests.engine.test_run import ENVIRONMENT

LIMIT, GRACE = 3.0, 2.0
WAIT = f"""
import sys, time
from engine.fault_tolerance import heartbeat
from engine.fault_tolerance.diagnosis import diagnose
heartbeat._GRACE_SECONDS = {GRACE}
beating = heartbeat.Heartbeat({LIMIT})
beating.step = STEP
print("beats", flush=True)
time.sleep(600)  # like a collective that never returns
"""
BEHAVIOR = {
    "runs": "time.sleep(600)",
    "finishes": f"time.sleep(1); beating.close(); time.sleep({2.5 * LIMIT})",
    "fails": "time.sleep(1); diagnose(ValueError(), beating); beating.close(); time.sleep(600)",
}


def start(second: str) -> list[processes.Process]:
    """Start rank 0, which waits forever at step 7, and rank 1, at step 5, with that behavior."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    scripts = WAIT.replace("STEP", "7"), WAIT.replace("STEP", "5").replace("time.sleep(600)", BEHAVIOR[second])
    ranks = [
        processes.Process([sys.executable, "-c", code], shared | {"RANK": str(rank)})
        for rank, code in enumerate(scripts)
    ]
    for process in ranks:
        process.wait_for_line("beats")
    return ranks


def end_of(process: processes.Process) -> tuple[str, float]:
    """Return the process's stderr, and the seconds until it ended."""
    begin = time.monotonic()
    text = process.communicate(timeout=25)[1]
    assert process.returncode == 1
    return text, time.monotonic() - begin


@pytest.mark.reliability
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_waiting_rank_names_the_lost_one_and_ends(number: signal.Signals) -> None:
    survivor, other = ranks = start("runs")
    try:
        time.sleep(2)  # some beats
        other.send_signal(number)
        text, seconds = end_of(survivor)
        assert "most recent call first" in text
        message = rf"error: rank 0 on \S+, step 7: rank 1 \(last at step 5\) did not answer within {LIMIT:g} s, or"
        assert re.search(message, text.splitlines()[-1]), text
        assert LIMIT < seconds < LIMIT + GRACE + 4
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_rank_0_is_named_where_the_store_is_gone_with_it() -> None:
    first, survivor = ranks = start("runs")
    try:
        time.sleep(1)
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(subprocess.TimeoutExpired):  # not at once: its training may be about to end
            survivor.wait(GRACE - 1)
        text, _ = end_of(survivor)
        assert re.search(r"error in rank 1: rank 1 on \S+, step 5: rank 0 did not answer", text), text
    finally:
        for process in ranks:
            process.kill()


def test_failed_rank_is_named_at_once() -> None:
    survivor, _ = ranks = start("fails")
    try:
        text, _ = end_of(survivor)
        assert re.search(r"rank 1 \(last at step 5\) did not answer .* \(it has failed\)", text), text
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_finished_or_waiting_rank_is_not_lost() -> None:
    pairs = [start("runs"), start("finishes")]
    try:
        time.sleep(LIMIT + GRACE + 1)
        assert [ranks[0].poll() for ranks in pairs] == [None, None]
    finally:
        for process in (process for ranks in pairs for process in ranks):
            process.kill()
