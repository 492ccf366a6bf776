"""Tests of the pool of worker threads."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from pipeline.system.thread_pool import Workers


class _Interruption(BaseException):
    """A BaseException that is no Exception."""


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Three threads whose states are 0, 1 and 2."""
    numbers = itertools.count()
    pool = Workers(3, lambda: next(numbers))
    yield pool
    pool.close()


def test_results_come_through_futures(workers: Workers) -> None:
    futures = [workers.submit(lambda state, a, b: (state, a + b), i, 100) for i in range(50)]
    results = [future.result(5) for future in futures]
    assert [total for _, total in results] == [i + 100 for i in range(50)]
    assert {state for state, _ in results} <= {0, 1, 2}


def test_workers_have_a_lower_priority(workers: Workers) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    theirs = workers.submit(lambda _: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result(5)
    assert own < theirs == min(own + 5, 19) or own == theirs == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


@pytest.mark.parametrize("error", [ValueError, KeyError, MemoryError, TimeoutError, SystemExit, _Interruption])
def test_exceptions_come_through_futures_and_the_thread_continues(error: type[BaseException]) -> None:
    raised = error("as it was raised")

    def fail(state: None) -> None:
        raise raised

    pool = Workers(1, lambda: None)
    assert pool.submit(fail).exception(5) is raised
    assert pool.submit(lambda state: "next").result(5) == "next"
    pool.close()


def test_each_thread_passes_a_state_of_its_own(workers: Workers) -> None:
    """All three run at once, so that each is in another thread."""
    barrier = threading.Barrier(3)

    def meet(state: int) -> tuple[int, int]:
        barrier.wait(5)
        return state, threading.get_ident()

    rounds = [[workers.submit(meet).result for _ in range(3)] for _ in range(4)]
    pairs = {result(5) for results in rounds for result in results}
    assert len(pairs) == len({state for state, _ in pairs}) == len({thread for _, thread in pairs}) == 3


def test_calls_of_one_thread_run_in_the_order_of_submission() -> None:
    done: list[int] = []
    pool = Workers(1, lambda: done)
    futures = [pool.submit(lambda state, n: state.append(n), number) for number in range(100)]
    futures[-1].result(timeout=5)
    pool.close()
    assert done == list(range(100))


def test_a_cancelled_call_does_not_run() -> None:
    hold, ran = threading.Event(), threading.Event()
    pool = Workers(1, lambda: None)
    pool.submit(lambda state: hold.wait(5))
    cancelled = pool.submit(lambda state: ran.set())
    assert cancelled.cancel()
    hold.set()
    assert pool.submit(lambda state: 7).result(5) == 7
    assert not ran.is_set()
    pool.close()


def test_close_ends_the_threads() -> None:
    before = threading.active_count()
    pool = Workers(4, lambda: None)
    assert threading.active_count() == before + 4
    pool.close()
    assert threading.active_count() == before
    pool.close()


def test_close_finishes_running_calls_and_cancels_waiting_ones() -> None:
    begun, resume = threading.Event(), threading.Event()
    pool = Workers(1, lambda: None)

    def hold(state: None) -> bool:
        begun.set()
        return resume.wait(5)

    running = pool.submit(hold)
    waiting = [pool.submit(lambda state: None) for _ in range(20)]
    begun.wait(5)
    threading.Timer(0.05, resume.set).start()
    pool.close()
    assert running.result(0)
    assert all(future.cancelled() for future in waiting)


def test_close_waits_for_hanging_threads_up_to_its_timeout() -> None:
    resume, begun = threading.Event(), threading.Barrier(5)
    pool = Workers(4, lambda: None)
    for _ in range(4):
        pool.submit(lambda state: (begun.wait(5), resume.wait(20)))
    begun.wait(5)
    start = time.monotonic()
    pool.close(timeout=0.2)
    assert 0.15 < time.monotonic() - start < 0.7
    resume.set()
    for thread in pool._threads:
        thread.join(5)


def test_a_garbage_collected_pool_ends_its_threads() -> None:
    before = threading.active_count()
    pool = Workers(2, lambda: None)
    pool.submit(lambda state: None).result(5)
    del pool
    gc.collect()
    assert threading.active_count() == before


def test_threads_do_not_keep_the_process_from_ending(workers: Workers) -> None:
    assert all(thread.daemon for thread in workers._threads)


def test_a_closed_pool_frees_its_buffers() -> None:
    class Buffer:
        pass

    buffers: list[weakref.ref[Buffer]] = []

    def state() -> Buffer:
        buffer = Buffer()
        buffers.append(weakref.ref(buffer))
        return buffer

    pool = Workers(2, state)
    pool.submit(lambda state: None).result(5)
    pool.close()
    del pool
    gc.collect()
    assert [buffer() for buffer in buffers] == [None, None]
