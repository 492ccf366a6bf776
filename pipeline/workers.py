"""A pool of worker threads, each with its own buffers, for compiled functions that release the GIL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Workers:
    """`count` daemon threads that run `submit`ted calls in order; each passes its own `state()` as first argument.

    Daemon threads, so that one that hangs (a dead network file system) cannot keep the process from ending.
    """

    def __init__(self, count: int, state: Callable[[], Any]) -> None:
        self._calls: SimpleQueue = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(state(),), name=f"loader-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Have a worker call `function(its state, *args)`; the future holds the result or the exception."""
        future: Future = Future()
        self._calls.put((future, function, args))
        return future

    def close(self, timeout: float = 5.0) -> None:
        """End the threads after the calls submitted so far; waits at most `timeout` seconds, for all together."""
        deadline = time.monotonic() + timeout
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, state: Any) -> None:
        while (call := self._calls.get()) is not None:
            future, function, args = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(state, *args))
            except BaseException as error:  # handed to whoever waits for the future
                future.set_exception(error)
