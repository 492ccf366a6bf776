"""Child processes of the benchmarks."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class JsonProcess:
    """A child process that answers lines of standard input with lines of JSON."""

    def __init__(self, call: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def send(self, line: str) -> None:
        """Send a line. If the process has ended, `receive` reports it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next answer; None if the process ended, with its reason on standard error."""
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith("{")), None)
        return None if line is None else json.loads(line)

    def ask(self, line: str) -> dict[str, Any] | None:
        """Send a line and wait for the answer."""
        self.send(line)
        return self.receive()

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def logged_session(call: str | Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a session of its own, with its output in `log`. At the end the session is killed."""
    with log.open("w") as file:
        process = subprocess.Popen(call, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
