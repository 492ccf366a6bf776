"""Processes forked from the tests' server are like those of new interpreters."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import processes

REPORT = """
import __main__, atexit, json, os, signal, sys, threading
assert __main__.__dict__ is globals() or __main__.__dict__.items() <= globals().items()
status = dict(line.split(":\\t") for line in open("/proc/self/status"))
print(json.dumps([__name__, sys.argv, os.getcwd(), os.environ.get("GIVEN"), "HOME" in os.environ, sys.path[:2]]))
print(status["Threads"].strip(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
atexit.register(print, "the end", flush=True)
threading.Thread(target=lambda: (threading.Event().wait(0.2), print("a thread"))).start()
print("a message", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("form", ["script", "module", "code"])
def test_command_runs_as_in_a_new_interpreter(form: str, tmp_path: Path) -> None:
    (tmp_path / "report.py").write_text(REPORT)
    first = {"script": [str(tmp_path / "report.py")], "module": ["-m", "report"], "code": ["-c", REPORT]}[form]
    command, env = [sys.executable, *first, "one", "two"], {"GIVEN": "x", "PYTHONPATH": str(tmp_path)}
    forked = processes.run(command, env, tmp_path)
    new = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert forked.returncode == new.returncode == 7, forked.stderr
    assert forked.stdout.split("\n") == new.stdout.split("\n")
    assert forked.stderr == new.stderr == "a message\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [("pass", 0), ("raise SystemExit('why')", 1), ("1 / 0", 1), ("raise KeyboardInterrupt", -signal.SIGINT)],
)
def test_status_is_that_of_a_new_interpreter(code: str, status: int) -> None:
    command = [sys.executable, "-c", code]
    forked, new = processes.run(command), subprocess.run(command, capture_output=True, text=True)
    assert forked.returncode == new.returncode == status
    assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def fail(message: str) -> None:
    raise ValueError(message)


def test_function_runs_in_a_process() -> None:
    process = processes.call(fail, "wrong")
    assert process.wait(30) == 1
    assert process.communicate()[1].endswith("ValueError: wrong\n")


def test_process_ends_by_signals_and_with_its_owner() -> None:
    endless = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    stopped, forgotten = processes.Process(endless), processes.Process(endless)
    for process in (stopped, forgotten):
        process.wait_for_line("begun")
        assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        stopped.wait(0.01)
    stopped.terminate()
    assert stopped.wait(30) == -signal.SIGTERM
    pid = forgotten.pid
    del process, forgotten
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(30)
