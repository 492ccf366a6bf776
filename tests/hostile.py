"""Input made to do harm: what becomes of a process that meets it, seen from outside, so that a crash is counted."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipeline.system.errors import InputError

FAULT = "hostile pickle in every slot; path traversal, bomb, YAML tag, forged beton"
_ENOUGH = 10
"""Children that crash or hang, after which no other is started."""
_ROOM = 4 << 30
"""Bytes of address space a child may take more than it has: where a bound is missing it fails, and harms nobody."""


class Outcome(NamedTuple):
    """What became of a child."""

    kinds: Counter[str]
    """How often: harmless, refused, failed (by another error), crashed, hung."""
    said: list[str]
    """Of each refusal or failure."""
    mebibytes: float
    """That the child took more than it began with, at most."""

    def __str__(self) -> str:
        count = sum(self.kinds.values())
        return (
            f"{count} mutations: {self.kinds['crashed']} crashes, {self.kinds['hung']} hangs, "
            f"{self.kinds['refused']} refused, {self.kinds['harmless']} harmless"
        )

    @property
    def bad(self) -> int:
        """How often it was neither harmless nor refused."""
        return sum(self.kinds.values()) - self.kinds["harmless"] - self.kinds["refused"]


def survived(one: Callable[[int], Any], count: int = 1, *, seconds: int = 60) -> Outcome:
    """Return what became of `one(0)` to `one(count - 1)`, each of which may raise InputError, in a child.

    One that crashes, or takes `seconds` for one of them, is counted, and another goes on after it, ten times.
    """
    kinds: Counter[str] = Counter()
    said: list[str] = []
    most = 0.0
    while (done := sum(kinds.values())) < count and kinds["hung"] + kinds["crashed"] < _ENOUGH:
        ends = os.pipe()
        child = os.fork()
        if not child:
            os.close(ends[0])
            _serve(one, range(done, count), seconds, ends[1])
        os.close(ends[1])
        with open(ends[0], "rb") as told:
            for line in told:
                kind, _, words = line.decode("utf-8", "backslashreplace").rstrip("\n").partition(" ")
                if kind == "took":
                    most = max(most, float(words))
                    continue
                kinds[kind] += 1
                said += [words] * bool(words)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            kinds["hung" if status == -signal.SIGALRM else "crashed"] += 1
            said.append(f"status {status} at number {sum(kinds.values()) - 1}")
    return Outcome(kinds, said, most)


def _serve(one: Callable[[int], Any], numbers: range, seconds: int, to: int) -> None:
    """Do the child's work, and end it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)  # those of OpenMP that the parent may have started are not there, and would be waited for
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for number in numbers:
            signal.alarm(seconds)
            kind, words = "harmless", ""
            try:
                one(number)
            except InputError as error:
                kind, words = "refused", str(error)
            except BaseException as error:
                kind, words = "failed", f"{type(error).__name__}: {error}, number {number}"
                traceback.print_exc()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            os.write(to, f"took {grown}\n{kind} {' '.join(words.split())}\n".encode("utf-8", "backslashreplace"))
    finally:
        sys.stderr.flush()
        os._exit(0)


class Payload:
    """What a hostile pickle holds: unpickled, it would create a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self._target}",)


def hostile_pickle(target: Path) -> bytes:
    """Return a pickle that would create the file `target` if it were run."""
    return pickle.dumps(Payload(target))


def record(property_: Callable[[str, object], None], figure: object) -> None:
    """Note the figure for the reliability table."""
    property_("fault", FAULT)
    property_("figure", str(figure))


reliability = pytest.mark.reliability
