"""Signs of life: which process was lost is known from who went on giving them.

Each process counts at the store where they met, four times a second, and names its step. One that was killed, stopped
or cut off does so no longer, while those that only wait for it go on; one that fails says so.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
import time

from torch import distributed

from engine.fault_tolerance.watchdog import dump_stacks
from engine.parallel.rendezvous import rank, store, world
from pipeline.system.errors import RunFailed, report

_PERIOD = 0.25  # seconds
_ANSWER = 5.0  # seconds that the store may take
_GRACE = 5.0  # seconds in which the training may find out by itself
_WRITING = 30.0  # seconds that a checkpoint under way is waited for
_GOES_ON, _FINISHED, _FAILED, _LOST = "goes-on", "finished", "failed", "lost"
_STORE = -1  # in place of a process's number


class LostProcess(RunFailed):
    """A process did not take part in an exchange in time, or ended; the message says which, as far as can be known."""


class Heartbeat:
    """Tells the others that this process lives, and at which `step` it is, from a thread of its own; watches theirs.

    Where another has given no sign of life for `limit` seconds, or has failed, and the training does not find out by
    itself, as it cannot while it waits for a GPU that waits for the other one, a second thread, which waits for nobody,
    prints all stacks, says so and ends this process with status 1. Beats come from a thread: evaluating or compiling
    does not silence a process. limit 0: only tells.
    """

    def __init__(self, limit: float = 0.0) -> None:
        self.step = 0
        """Steps trained."""
        self._limit, self._state = limit, _GOES_ON
        self._silent = dict.fromkeys([_STORE, *(n for n in range(world()) if n != rank())], 0.0)
        self._last = dict.fromkeys((n for n in range(world()) if n != rank()), "")  # never grows: two threads read it
        self._deaf = False  # the store cannot be reached
        self._end, self._aware = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="heartbeats", daemon=True)
        if world() > 1:
            self._shared = store().clone()  # type: ignore[attr-defined]
            self._thread.start()
            if limit:
                self._watcher.start()

    def unwatch(self) -> None:
        """Watch the others no more: this process ends, or knows."""
        self._aware.set()

    def close(self) -> None:
        """Tell no more."""
        self.unwatch()
        if self._state == _GOES_ON:
            self._state = _FINISHED
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(0 if self._deaf else _ANSWER)

    def _beat(self) -> None:
        try:
            count = 0
            while not self._end.wait(_PERIOD):
                count += 1
                self._tell(count)
                if count % 4 == 0:
                    self._listen()
            self._tell(count + 1)
        except (distributed.DistError, RuntimeError):
            pass  # the store has gone, and with it the run: the training itself will meet that, or the watch

    def _tell(self, count: int) -> None:
        self._shared.set(_key(rank()), f"{count} {self.step} {self._state}")

    def _listen(self) -> None:
        """Note who has given a sign of life, and that the store has."""
        for number, last in _heard(self._shared).items():
            if number != rank() and last != self._last[number]:
                self._last[number], self._silent[number] = last, 0.0
        self._silent[_STORE] = 0.0

    def _watch(self) -> None:
        """End the process where another is lost, and the training has not found out."""
        before, lost = time.monotonic(), 0.0
        while not self._aware.wait(_PERIOD):
            now = time.monotonic()
            passed = min(now - before, 2 * _PERIOD)  # not the time in which this process was stopped itself
            before = now
            for number in self._silent:
                self._silent[number] += passed
            lost = lost + passed if self._missed() else 0.0
            if lost > _GRACE:
                self._end_all()

    def _missed(self) -> bool:
        """Return whether another process has been silent for too long, or said that it has failed."""
        states = {number: last.split()[2] for number, last in self._last.items() if last}
        if any(state in (_FAILED, _LOST) for state in states.values()):
            return True
        return any(silent > self._limit and states.get(n) != _FINISHED for n, silent in self._silent.items())

    def _end_all(self) -> None:
        silent = {number for number, seconds in self._silent.items() if seconds > min(self._limit, _GRACE)}
        failed = {number for number, last in self._last.items() if last.endswith(_FAILED)}
        whose = _FIRST if _STORE in silent else _named({number: self._last[number] for number in silent | failed})
        dump_stacks()
        why = "it said that it failed" if failed and failed >= silent else "the training waited on"
        report(self._lost(whose, self._limit, why), 1)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(_WRITING)
        sys.stderr.flush()
        os._exit(1)

    def explained(self, error: BaseException, seconds: float, alike: bool = False) -> BaseException:
        """Return what a failed exchange of data means, or the error itself where it is none.

        seconds: that processes wait for each other. alike: all processes meet this error.
        """
        self._state = _FINISHED if alike else _FAILED
        self.unwatch()
        text = str(error)
        if (
            world() == 1
            or not isinstance(error, RuntimeError)
            or isinstance(error, RunFailed)
            or not (isinstance(error, distributed.DistError) or re.search("gloo|nccl|timed out", text, re.IGNORECASE))
        ):
            return error
        self._state = _LOST
        found: list[dict[int, str]] = []
        if self._silent[_STORE] < _ANSWER:
            asked = threading.Thread(target=_look, daemon=True, args=(found,))
            asked.start()
            asked.join(4 * _PERIOD + _ANSWER)
        self._deaf = not found
        return self._lost(_FIRST if not found else _named(found[0]), seconds, text.splitlines()[0][:200])

    def _lost(self, whose: str, seconds: float, why: str) -> LostProcess:
        return LostProcess(
            f"process {rank()} on {platform.node()}, step {self.step}: {whose} did not answer within {seconds:g} s, or "
            f"ended ({why}): see its own output, then give the same command again with --resume auto"
        )


_FIRST = "the first process"


def _key(number: int) -> str:
    return f"millrace/beat/{number}"


def _look(found: list[dict[int, str]]) -> None:
    """Add the silent processes and the last that was heard of each, if the store can be reached."""
    try:
        shared = store().clone()  # type: ignore[attr-defined]
        before = _heard(shared)
        time.sleep(2.4 * _PERIOD)
        after = _heard(shared)
    except (distributed.DistError, RuntimeError):
        return
    found.append({number: last for number, last in after.items() if last == before[number] and number != rank()})


def _heard(shared: distributed.Store) -> dict[int, str]:
    keys = {number: _key(number) for number in range(world())}
    return {n: shared.get(key).decode() if shared.check([key]) else "" for n, key in keys.items()}


def _named(silent: dict[int, str]) -> str:
    """Return the silent processes in words, those that came least far first."""
    if not silent:
        return "another process"
    told = [f"{n}" + (f" (last at step {last.split()[1]})" if last else "") for n, last in sorted(silent.items())]
    return f"process{'es' if len(told) > 1 else ''} {', '.join(told)}"
