"""A process that waits for a lost one where Python cannot tell it so ends all the same, and says which was lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.engine.test_run import ENVIRONMENT, ROOT

LIMIT, GRACE = 3.0, 2.0
SURVIVOR = f"""
import sys, time
from engine.fault_tolerance import heartbeat
heartbeat._GRACE = {GRACE}
beating = heartbeat.Heartbeat({LIMIT})
beating.step = 7
print("beats", flush=True)
time.sleep(600)  # as a collective that never returns
"""
OTHERS = {
    "goes on": "time.sleep(2.5 * LIMIT)",
    "finishes": "time.sleep(1); beating.close(); time.sleep(2.5 * LIMIT)",
    "fails": "time.sleep(1); beating.explained(ValueError(), LIMIT); beating.close(); time.sleep(600)",
}


def pair(other: str) -> list[subprocess.Popen[str]]:
    """Start a process that waits for ever, the first one, and another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared["PYTHONPATH"] = str(ROOT)
    told = SURVIVOR.replace("time.sleep(600)", OTHERS[other].replace("LIMIT", str(LIMIT))).replace(
        "step = 7", "step = 5"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, code in enumerate((SURVIVOR, told))
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "beats\n"
    return started


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[str, float]:
    """Return what it said, and after how many seconds it ended."""
    begun = time.monotonic()
    text = process.communicate(timeout=seconds)[1]
    return text, time.monotonic() - begun


@pytest.mark.reliability
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_waits_without_end_names_the_lost_one_and_ends(number: signal.Signals) -> None:
    survivor, other = started = pair("goes on")
    try:
        time.sleep(2)  # some beats
        other.send_signal(number)
        text, took = ended(survivor, 25)
        assert survivor.returncode == 1
        assert "most recent call first" in text
        says = rf"error: process 0 on \S+, step 7: process 1 \(last at step 5\) did not answer within {LIMIT:g} s, or"
        assert re.search(says, text.splitlines()[-1]), text
        assert LIMIT < took < LIMIT + GRACE + 4
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_the_first_process_is_named_where_it_and_the_store_are_gone() -> None:
    first, survivor = started = pair("goes on")
    try:
        time.sleep(1)
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(subprocess.TimeoutExpired):  # not at once: it may be about to end by itself
            survivor.wait(GRACE - 1)
        text, _ = ended(survivor, 25)
        assert survivor.returncode == 1
        assert re.search(r"error in rank 1: process 1 on \S+, step 5: the first process did not answer", text), text
    finally:
        for process in started:
            process.kill()


def test_a_process_that_says_that_it_failed_is_named_at_once() -> None:
    survivor, _ = started = pair("fails")
    try:
        text, _ = ended(survivor, 25)
        assert survivor.returncode == 1
        assert re.search(r"process 1 \(last at step 5\) did not answer .* \(it said that it failed\)", text), text
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_one_that_has_finished_or_waits_alike_is_not_missed() -> None:
    pairs = [pair("goes on"), pair("finishes")]
    try:
        time.sleep(LIMIT + GRACE + 1)
        assert [started[0].poll() for started in pairs] == [None, None]
    finally:
        for process in (process for started in pairs for process in started):
            process.kill()
