"""Stopping when asked to: all processes at the same step, with a checkpoint of it.

SIGTERM and SIGINT ask for a stop, SIGUSR1 for one to be queued again (Slurm). One process may be asked, or all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

import torch

from engine.parallel import collectives

REQUEUE = 75
"""Exit status where the job is to be queued again (EX_TEMPFAIL of sysexits.h)."""
_NOTHING, _STOP, _QUEUE_AGAIN = range(3)
_MEANING = {signal.SIGTERM: _STOP, signal.SIGINT: _STOP, signal.SIGUSR1: _QUEUE_AGAIN}
_REPEATED = 1.0  # seconds in which a launcher passes on the Ctrl-C that the terminal had sent to all
_EVERY = 1.0  # seconds, about, between two agreements ...
_MOST = 100  # ... and steps at most
_LAUNCHED = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")  # set by accelerate launch, torchrun
_SET_PDEATHSIG = 1  # of linux/prctl.h


class Stopped(Exception):
    """Training ended before its last step, as asked, with a checkpoint."""

    def __init__(self, step: int, requeue: bool) -> None:
        super().__init__(f"stopped after step {step}, as asked: give the same command again with --resume auto")
        self.status = REQUEUE if requeue else 0


class Requests:
    """What this process was asked to do, and what all of them agree on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked, self._at = _NOTHING, 0.0
        self._calls = self._next = self._last = 0
        self._what = ""
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """A context in which signals are requests, a followed launcher's end too. For the main thread."""
        before = {number: signal.signal(number, self._hear) for number in _MEANING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._asked and now - self._at > _REPEATED:
            raise KeyboardInterrupt
        first, self._asked = not self._asked, max(self._asked, _MEANING[signal.Signals(number)])
        if first:
            self._at = now
            name = signal.Signals(number).name
            says = "again to stop at once" if number == signal.SIGINT else "at the end of a step or batch"
            _say(f"{name}: stopping with a checkpoint, {says}\n")

    def agreed(self, step: int, what: str = "step") -> Stopped | None:
        """Return what all processes have agreed on after `step`, the same on all; called by all equally often.

        what: is done between two calls, by its name. With several processes they ask each other about every second, by
        their mean time for it: one small collective, for which the host waits.
        """
        if collectives.world() == 1:
            return Stopped(step, self._asked == _QUEUE_AGAIN) if self._asked else None
        self._calls += 1
        if what != self._what:  # which may take longer: ask at once, and measure it
            self._what, self._last, self._next = what, self._calls - 1, self._calls
        if self._calls < self._next:
            return None
        took = (time.perf_counter() - self._since) / (self._calls - self._last)
        own = torch.tensor([[float(self._asked), took]], dtype=torch.float32, device=self._device)
        asked, took = collectives.gather(own).max(dim=0).values.tolist()
        self._last, self._since = self._calls, time.perf_counter()
        self._next = self._calls + max(1, min(_MOST, round(_EVERY / max(took, 1e-6))))
        return Stopped(step, asked == _QUEUE_AGAIN) if asked else None


def _say(line: str) -> None:
    """Write to stderr. Where nobody reads any more, as after Ctrl-C with `2>&1 | tee`, all that follows is dropped."""
    with contextlib.suppress(OSError):
        try:
            os.write(2, line.encode())
        except BrokenPipeError:
            gone = [2, 1] if os.path.sameopenfile(1, 2) else [2]
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in gone:
                os.dup2(nowhere, stream)
            os.close(nowhere)


def follow_launcher() -> None:
    """Have the system send SIGTERM when the launcher that started this process, if one did, ends (Linux)."""
    if not any(name in os.environ for name in _LAUNCHED):
        return
    launcher = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)
