"""Hostile input, read in child processes, so that crashes and hangs are counted."""

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
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from pipeline.system.errors import InputError

FAULT = "hostile pickle in every slot; path traversal, bomb, YAML tag, forged beton"
_MAX_LOST_CHILDREN = 10
_MAX_GROWTH_BYTES = 4 << 30  # of a child's address space: a missing bound fails early


class Outcome(NamedTuple):
    """Results of calls in child processes."""

    kinds: Counter[str]
    """Counts of harmless, refused, failed (another error), crashed, hung."""
    messages: list[str]
    """One for each call that was not harmless."""
    mebibytes: float
    """Largest growth of a child's memory."""

    def __str__(self) -> str:
        count = sum(self.kinds.values())
        return (
            f"{count} mutations: {self.kinds['crashed']} crashes, {self.kinds['hung']} hangs, "
            f"{self.kinds['refused']} refused, {self.kinds['harmless']} harmless"
        )

    @property
    def bad(self) -> int:
        """Count of calls that were neither harmless nor refused."""
        return sum(self.kinds.values()) - self.kinds["harmless"] - self.kinds["refused"]


def survived(one: Callable[[int], Any], count: int = 1, *, seconds: int = 60) -> Outcome:
    """Call `one(0)` to `one(count - 1)` in a child process. Each may raise InputError, which counts as refused.

    A crash, or a call of more than `seconds`, ends the child; another continues after it, ten times at most.
    """
    kinds: Counter[str] = Counter()
    messages: list[str] = []
    growth = 0.0
    while (done := sum(kinds.values())) < count and kinds["hung"] + kinds["crashed"] < _MAX_LOST_CHILDREN:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            _serve(one, range(done, count), seconds, writer)
        os.close(writer)
        with open(reader, "rb") as lines:
            for line in lines:
                kind, _, text = line.decode("utf-8", "backslashreplace").rstrip("\n").partition(" ")
                if kind == "grown":
                    growth = max(growth, float(text))
                    continue
                kinds[kind] += 1
                messages += [text] * bool(text)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            kinds["hung" if status == -signal.SIGALRM else "crashed"] += 1
            messages.append(f"status {status} at number {sum(kinds.values()) - 1}")
    return Outcome(kinds, messages, growth)


def _serve(one: Callable[[int], Any], numbers: range, seconds: int, writer: int) -> NoReturn:
    """Do the child's calls, write a line for each, and exit."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)  # OpenMP's threads are the parent's: the child would wait for them forever
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MAX_GROWTH_BYTES, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for number in numbers:
            signal.alarm(seconds)
            kind, text = "harmless", ""
            try:
                one(number)
            except InputError as error:
                kind, text = "refused", str(error)
            except BaseException as error:
                kind, text = "failed", f"{type(error).__name__}: {error}, number {number}"
                traceback.print_exc()
            growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            os.write(writer, f"grown {growth}\n{kind} {' '.join(text.split())}\n".encode("utf-8", "backslashreplace"))
    finally:
        sys.stderr.flush()
        os._exit(0)


class Payload:
    """An object that creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self._target}",)


def hostile_pickle(target: Path) -> bytes:
    """Return a pickle that creates the file `target` when loaded."""
    return pickle.dumps(Payload(target))


def record(property_: Callable[[str, object], None], figure: object) -> None:
    """Record a figure for the reliability table."""
    property_("fault", FAULT)
    property_("figure", str(figure))


reliability = pytest.mark.reliability
