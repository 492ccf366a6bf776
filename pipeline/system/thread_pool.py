"""A pool of worker threads, each with its own buffers, for compiled functions that release the GIL."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_NICE = 5
"""Added to a worker's niceness: where cores are short, the thread that launches the step goes first, and with it the
other processes that wait for it; a worker that falls behind has all cores once that thread waits for it."""


class Workers:
    """`count` daemon threads that run `submit`ted calls in order; each passes its own `state()` as first argument.

    Daemon threads, so that one that hangs (a dead network file system) cannot keep the process from ending.
    """

    def __init__(self, count: int, state: Callable[[], Any]) -> None:
        self._calls: SimpleQueue = SimpleQueue()
        self._threads = [
            threading.Thread(target=_run, args=(self._calls, state()), name=f"loader-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        # Also when this is forgotten or the interpreter ends: a thread still in compiled code then would abort it.
        self._close = weakref.finalize(self, _end, self._calls, self._threads)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Have a worker call `function(its state, *args)`; the future holds the result or the exception."""
        future: Future = Future()
        self._calls.put((future, function, args))
        return future

    def in_order(
        self,
        function: Callable[[Any, Item], Result],
        items: Iterable[Item],
        ahead: int,
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """Yield `function(its state, item)` of each item in turn, of which the next `ahead` are always under way.

        Raises what a call raised, and TimeoutError where one takes longer than `timeout` seconds.
        """
        rest, under_way = iter(items), deque[Future]()
        try:
            for item in islice(rest, ahead):
                under_way.append(self.submit(function, item))
            while under_way:
                result = under_way[0].result(timeout)
                under_way.popleft()
                for item in islice(rest, 1):
                    under_way.append(self.submit(function, item))
                yield result
        finally:
            for future in under_way:
                future.cancel()

    def close(self, timeout: float = 5.0) -> None:
        """Cancel the calls that have not begun and end the threads, but for those that hang for `timeout` seconds."""
        if self._close.detach():
            _end(self._calls, self._threads, timeout)


def _run(calls: SimpleQueue, state: Any) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not on every system
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
    while (call := calls.get()) is not None:
        future, function, args = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(state, *args))
        except BaseException as error:  # handed to whoever waits for the future
            future.set_exception(error)
        del call, future, function, args  # while waiting for the next call, this one's buffers are not kept alive


def _end(calls: SimpleQueue, threads: list[threading.Thread], timeout: float = 5.0) -> None:
    with contextlib.suppress(Empty):
        while True:
            call = calls.get_nowait()
            if call is not None:
                call[0].cancel()
    for _ in threads:
        calls.put(None)
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
