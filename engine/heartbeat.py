"""Signs of life: which process was lost is known from who went on giving them.

Each process counts at the store where they met, four times a second, and names its step. One that was killed, stopped
or cut off does so no longer, while those that only wait for it go on.
"""

from __future__ import annotations

import platform
import re
import threading
import time

from torch import distributed

from engine.meeting import rank, store, world
from pipeline.errors import RunFailed

_PERIOD = 0.25  # seconds
_ANSWER = 5.0  # seconds that the store may take


class LostProcess(RunFailed):
    """A process did not take part in an exchange in time, or ended; the message says which, as far as can be known."""


class Heartbeat:
    """Tells the others that this process lives, and at which `step` it is, from a thread of its own."""

    def __init__(self) -> None:
        self.step = 0
        """Steps trained."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if world() > 1:
            self._shared = store().clone()  # type: ignore[attr-defined]
            self._thread.start()

    def close(self) -> None:
        """Tell no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_ANSWER)

    def _beat(self) -> None:
        try:
            count = 0
            while not self._end.wait(_PERIOD):
                count += 1
                self._shared.set(_key(rank()), f"{count} {self.step}")
        except (distributed.DistError, RuntimeError):
            pass  # the store has gone, and with it the run: the training itself will meet that

    def explained(self, error: RuntimeError, seconds: float) -> RuntimeError:
        """Return what a failed exchange of data means, or the error itself where it is none.

        seconds: that processes wait for each other.
        """
        text = str(error)
        if world() == 1 or not (
            isinstance(error, distributed.DistError) or re.search("gloo|nccl|timed out", text, re.IGNORECASE)
        ):
            return error
        found: list[dict[int, str]] = []
        asked = threading.Thread(target=_look, daemon=True, args=(found,))
        asked.start()
        asked.join(4 * _PERIOD + _ANSWER)
        whose = "the first process" if not found else _named(found[0])
        return LostProcess(
            f"process {rank()} on {platform.node()}, step {self.step}: {whose} did not answer within {seconds:g} s, or "
            f"ended ({text.splitlines()[0][:200]}): see its own output, then give the same command again with "
            "--resume auto"
        )


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
