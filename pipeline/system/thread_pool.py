"""A pool of worker threads, each with its own buffers, for compiled functions that release the GIL."""

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
_NICENESS = 5
"""Added to a worker's niceness. Where cores are short, the thread that launches the training step runs first, and other
ranks do not wait for it. Workers that fall behind get all cores as soon as that thread waits for a batch."""


class Workers:
    """`count` threads that run submitted calls in order. Each passes its own `state()` as the first argument.

    Daemon threads: one that hangs, on a dead network file system say, does not keep the process from ending.
    """

    def __init__(self, count: int, state: Callable[[], Any]) -> None:
        self._calls: SimpleQueue = SimpleQueue()
        self._threads = [
            threading.Thread(target=_run, args=(self._calls, state()), name=f"loader-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()
        # Also at garbage collection and at exit, where a thread in compiled code would abort the interpreter.
        self._close = weakref.finalize(self, _end, self._calls, self._threads)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Have a worker call `function(its state, *args)`; return the future of the result or the exception."""
        future: Future = Future()
        self._calls.put((future, function, args))
        return future

    def in_order(
        self, function: Callable[[Any, Item], Result], items: Iterable[Item], ahead: int, timeout: float | None = None
    ) -> Iterator[Result]:
        """Yield `function(a worker's state, item)` of each item in order, with the next `ahead` always under way.

        Raises the exception of a call, and TimeoutError where one takes longer than `timeout` seconds.
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
        """Cancel the calls that have not begun and end the threads, except any that hangs for `timeout` seconds."""
        if self._close.detach():
            _end(self._calls, self._threads, timeout)


def _run(calls: SimpleQueue, state: Any) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not supported on every system
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
    while (call := calls.get()) is not None:
        future, function, args = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(state, *args))
        except BaseException as error:  # raised again by `future.result`
            future.set_exception(error)
        del call, future, function, args  # or their buffers would stay alive until the next call


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
