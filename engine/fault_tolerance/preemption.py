"""Stop requests: all ranks stop after the same step, with a checkpoint of it.

SIGTERM and SIGINT request a stop, SIGUSR1 a stop and a place in the queue (Slurm). One rank may receive them, or all.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import torch

from engine.parallel import collectives
from engine.parallel.rendezvous import world

REQUEUE = 75
"""Exit status of a job to be queued again (EX_TEMPFAIL of sysexits.h)."""
_NONE, _STOP, _REQUEUE = range(3)
_REQUESTS = {signal.SIGTERM: _STOP, signal.SIGINT: _STOP, signal.SIGUSR1: _REQUEUE}
_FORWARD_SECONDS = 1.0  # time for a launcher to forward the Ctrl-C that the terminal has sent to all processes
_POLL_SECONDS = 1.0  # mean time between two exchanges of the ranks' requests ...
_MAX_POLL_STEPS = 100  # ... and steps at most
_LAUNCHED = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")  # set by accelerate launch, torchrun
_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(Exception):
    """Training stopped as requested before its last step, with a checkpoint. Raised on all ranks."""

    def __init__(self, step: int, requeue: bool) -> None:
        remedy = 'give the same command again with --resume auto (in Python, resume="auto")'
        super().__init__(f"stopped after step {step}, as requested: {remedy}")
        self.status = REQUEUE if requeue else 0


class Requests:
    """Stop requests of this rank, and their exchange between ranks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._request, self._request_time = _NONE, 0.0
        self._calls = self._next = self._last = 0
        self._unit = ""
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Return a context in which signals are requests. For the main thread."""
        handlers = {number: signal.signal(number, self._handle) for number in _REQUESTS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._request and now - self._request_time > _FORWARD_SECONDS:
            raise KeyboardInterrupt
        first, self._request = not self._request, max(self._request, _REQUESTS[signal.Signals(number)])
        if first:
            self._request_time = now
            when = "again to stop at once" if number == signal.SIGINT else "at the end of a step or batch"
            _write(f"{signal.Signals(number).name}: stopping with a checkpoint, {when}\n")

    def poll_stop(self, step: int, unit: str = "step") -> Stopped | None:
        """Return, on all ranks alike, whether any was requested to stop; `step` is the last one taken.

        Called by all ranks equally often. unit: the name of the work done between two calls. Ranks exchange their
        requests about every second, by the mean time of a unit: one small collective, for which the host waits.
        """
        if world() == 1:
            return Stopped(step, self._request == _REQUEUE) if self._request else None
        self._calls += 1
        if unit != self._unit:  # it may take longer: exchange at once, and measure it
            self._unit, self._last, self._next = unit, self._calls - 1, self._calls
        if self._calls < self._next:
            return None
        seconds = (time.perf_counter() - self._since) / (self._calls - self._last)
        local = torch.tensor([[float(self._request), seconds]], dtype=torch.float32, device=self._device)
        request, seconds = collectives.gather(local).max(dim=0).values.tolist()
        self._last, self._since = self._calls, time.perf_counter()
        self._next = self._calls + max(1, min(_MAX_POLL_STEPS, round(_POLL_SECONDS / max(seconds, 1e-6))))
        return Stopped(step, request == _REQUEUE) if request else None


def _write(line: str) -> None:
    """Write to stderr; where its reader is gone, as after Ctrl-C with `2>&1 | tee`, drop this and all later output.

    Not through logging, whose lock the interrupted code may hold.
    """
    with contextlib.suppress(OSError):
        try:
            os.write(2, line.encode())
        except BrokenPipeError:
            streams = [2, 1] if os.path.sameopenfile(1, 2) else [2]
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in streams:
                os.dup2(null, stream)
            os.close(null)


def follow_launcher() -> None:
    """Have the system send SIGTERM when the launcher of this process ends, if there is one (Linux)."""
    if not any(name in os.environ for name in _LAUNCHED):
        return
    launcher = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:  # it has ended by now
        os.kill(os.getpid(), signal.SIGTERM)
