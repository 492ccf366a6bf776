"""What processes tell each other before and beside the steps: what went wrong on one ends all, with one message.

They meet at the store that their launcher names (torch.distributed's environment variables), so that a process without
a GPU, or with another file, is heard of before any collective that it would not take part in.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from engine.parallel.rendezvous import PATIENCE, SLICE, heard, rank, store, world
from pipeline.system.errors import InputError

T = TypeVar("T")
_meetings = 0


class Told(InputError):
    """A problem of one process that all were told of; the first one reports it."""

    reported = True


def together(
    action: Callable[[], T],
    facts: Callable[[T], Mapping[str, Any]] = lambda result: {},
    patience: timedelta = PATIENCE,
) -> T:
    """Return `action()` once it has succeeded on all processes, and `facts` of the results are the same on all.

    Else raises Told on all of them: with the message of the first on which it failed. facts: plain JSON values.
    patience: from the first process to the last. To be called by all processes, in the same order.
    """
    error: Exception | None = None
    own: dict[str, Any] = {"host": platform.node(), "problem": "", "facts": {}}
    try:
        result = action()
        own["facts"] = json.loads(json.dumps({**facts(result), **_own_facts()}))
    except Exception as raised:
        own["problem"], error = str(raised) or type(raised).__name__, raised
    if world() == 1:
        if error is not None:
            raise error
        return result
    verdict = _exchange(own, patience)
    if error is not None and not isinstance(error, InputError):
        raise error
    if verdict:
        raise Told(verdict) from None
    return result


def from_first(action: Callable[[], T]) -> T:
    """Return, on all processes, what `action()` returned on the first: plain JSON values. Raises Told on all of them.

    To be called by all processes, in the same order.
    """
    found: list[T] = []
    together(lambda: found.append(action()) if rank() == 0 else None)
    if world() == 1:
        return found[0]
    key = f"millrace/{_meetings}/result"
    if rank() == 0:
        store().set(key, json.dumps(found[0]))
    return json.loads(_wait(key, 0))


def from_all(action: Callable[[], T], patience: timedelta = PATIENCE) -> list[T]:
    """Return, on all processes, what `action()` returned on each: plain JSON values. Raises Told on all of them.

    patience: from the first process to the last. To be called by all processes, in the same order.
    """
    own = together(action, patience=patience)
    if world() == 1:
        return [own]
    key = f"millrace/{_meetings}/result"
    store().set(f"{key}/{rank()}", json.dumps(own))
    return [json.loads(_wait(f"{key}/{number}", number)) for number in range(world())]


def _own_facts() -> dict[str, Any]:
    """Return what of the processes themselves has to be the same."""
    return {"WORLD_SIZE": world(), "torch": str(torch.__version__)}


def _exchange(own: Mapping[str, Any], patience: timedelta) -> str:
    """Tell the first process, and return what it finds wrong, if anything."""
    global _meetings
    _meetings += 1
    key = f"millrace/{_meetings}"
    shared = store()
    shared.set(f"{key}/{rank()}", json.dumps(own))
    if rank() == 0:
        everyone = [json.loads(_wait(f"{key}/{number}", number, patience)) for number in range(world())]
        shared.set(key, _verdict(everyone))
    if verdict := _wait(key, 0, patience):
        leave()
    return verdict


def leave() -> None:
    """Have the first process, with which the store may end, wait until the others have come here, for some seconds."""
    shared = store()
    if rank():
        shared.set(f"millrace/{_meetings}/leave/{rank()}", "")
        return
    with contextlib.suppress(distributed.DistError):
        shared.wait([f"millrace/{_meetings}/leave/{number}" for number in range(1, world())], SLICE)


def _wait(key: str, number: int, patience: timedelta = PATIENCE) -> str:
    return heard(store(), key, number, patience)


def _verdict(everyone: list[dict[str, Any]]) -> str:
    """Return what is wrong, in one line, or nothing."""
    problems = [who["problem"] for who in everyone]
    if any(problems):
        number = next(number for number, problem in enumerate(problems) if problem)
        alone = len(set(problems)) > 1
        return f"process {number} on {everyone[number]['host']}: {problems[number]}" if alone else problems[number]
    first = everyone[0]
    for number, who in enumerate(everyone):
        for key in sorted(first["facts"].keys() | who["facts"].keys()):
            here, there = first["facts"].get(key), who["facts"].get(key)
            if here != there:
                return (
                    f"{key}: process 0 on {first['host']} has {here!r}, process {number} on {who['host']} {there!r}: "
                    "give all processes the same"
                )
    return ""
