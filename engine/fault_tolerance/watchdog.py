"""Ends a run in which nothing goes on any more, with every thread's stack."""

from __future__ import annotations

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

_LOOKS = 50  # within the limit


def dump_stacks(error: BaseException | None = None) -> None:
    """Print where `error` was raised, and the stack of every thread, on stderr."""
    with contextlib.suppress(OSError):
        if error is not None:
            print("Traceback (most recent call last):", file=sys.stderr)
            traceback.print_tb(error.__traceback__)
            sys.stderr.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)


class Watchdog:
    """Watches that steps are taken: after `limit` seconds without one, prints all stacks and ends the process.

    Armed by the first step, which may take long to compile. A second watch, within the interpreter's C code, ends the
    process a little later where no Python code can run any more. limit 0: no watch.
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
        """Say that `step` was taken."""
        self._step, self._since = step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which no steps are to be expected."""
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
        while not self._end.wait(self._limit / _LOOKS):
            faulthandler.dump_traceback_later(1.2 * self._limit + 5, exit=True, file=2)
            if self._paused or self._step is None:
                self._since = time.monotonic()
            elif (stood := time.monotonic() - self._since) > self._limit:
                print(
                    f"error: process {rank()} on {platform.node()}, step {self._step}: no step for {stood:.1f} s "
                    "(step_timeout): the stack of every thread follows; give the same command again with --resume auto",
                    file=sys.stderr,
                    flush=True,
                )
                dump_stacks()
                os._exit(1)
