"""The end of a process that is stuck, with every thread's stack; a watchdog ends one that takes no more steps."""

import contextlib
import faulthandler
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from engine.parallel.rendezvous import rank
from pipeline.system.errors import RunFailed, report

_CHECKS_PER_LIMIT = 50
_WRITE_SECONDS = 30.0  # longest wait for a checkpoint that is being written


def dump_stacks(error: BaseException | None = None) -> None:
    """Print where `error` was raised, and the stack of every thread, on stderr."""
    with contextlib.suppress(OSError):
        if error is not None:
            print("Traceback (most recent call last):", file=sys.stderr)
            traceback.print_tb(error.__traceback__)
            sys.stderr.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)


def end_process(error: RunFailed) -> None:
    """Print all stacks and the error, wait for a checkpoint that is being written, and exit with status 1.

    Not through logging, whose lock the training may hold.
    """
    dump_stacks()
    report(error, 1)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(_WRITE_SECONDS)
    sys.stderr.flush()
    os._exit(1)


class Watchdog:
    """Ends the process, with all stacks, after `limit` seconds without a step; limit 0: never.

    Armed by the first step, which may take long to compile. A second watch, within the interpreter's C code, ends the
    process a little later where no Python code can run any more.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._step: int | None = None
        self._since = time.monotonic()
        self._paused = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit:
            self._thread.start()

    def beat(self, step: int) -> None:
        """Note that `step` was taken."""
        self._step, self._since = step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which no steps are expected."""
        self._paused += 1
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._paused -= 1

    def close(self) -> None:
        """End the watch."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._limit:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._end.wait(self._limit / _CHECKS_PER_LIMIT):
            faulthandler.dump_traceback_later(1.2 * self._limit + 5, exit=True, file=2)
            if self._paused or self._step is None:
                self._since = time.monotonic()
            elif (idle := time.monotonic() - self._since) > self._limit:
                print(  # not through logging, whose lock a stuck thread may hold
                    f"error: rank {rank()} on {platform.node()}, step {self._step}: no step for {idle:.1f} s "
                    "(step_timeout): the stack of every thread follows; give the same command again with --resume auto",
                    file=sys.stderr,
                    flush=True,
                )
                dump_stacks()
                os._exit(1)
