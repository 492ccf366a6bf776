"""Agreement between ranks outside the training step: a problem of one rank ends all of them, with one message.

Ranks exchange JSON at the launcher's store, not by torch's object collectives: these need a process group, which NCCL
cannot form with a rank that has no GPU. Such a rank, or one with another file, must be heard before any collective.
"""

import contextlib
import json
import platform
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from engine.parallel.rendezvous import JOIN_SECONDS, NOTICE_SECONDS, rank, store, wait_for, world
from pipeline.system.errors import InputError

T = TypeVar("T")
_exchanges = 0


class PeerError(InputError):
    """A problem of one rank, raised on all ranks and reported by rank 0."""

    reported = True


def run_on_all_ranks(action: Callable[[], T], must_match: Callable[[T], Mapping[str, Any]] = lambda result: {}) -> T:
    """Run `action` on every rank and return its result; see `run_and_gather`."""
    return run_and_gather(action, lambda result: None, must_match)[0]


def all_gather_object(action: Callable[[], T], seconds: float = JOIN_SECONDS) -> list[T]:
    """Run `action` on every rank; return the results, plain JSON values, in order of rank; see `run_and_gather`."""
    return run_and_gather(action, lambda result: result, seconds=seconds)[1]


def broadcast_object(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; return its result, plain JSON values, on every rank; see `run_and_gather`."""
    return all_gather_object(lambda: action() if rank() == 0 else None)[0]  # type: ignore[return-value]


def run_and_gather(
    action: Callable[[], T],
    gather: Callable[[T], Any],
    must_match: Callable[[T], Mapping[str, Any]] = lambda result: {},
    seconds: float = JOIN_SECONDS,
) -> tuple[T, list[Any]]:
    """Run `action` on every rank; return its result, and `gather` of each rank's result, in order of rank.

    Called by all ranks, in the same order. `gather` and `must_match` return plain JSON values. seconds: from the first
    rank to the last. Raises PeerError, on all ranks, where `action` fails on one, or `must_match` differs on two.
    """
    error: Exception | None = None
    post: dict[str, Any] = {"host": platform.node(), "problem": "", "facts": {}, "value": None}
    try:
        result = action()
        post["facts"] = {**must_match(result), "WORLD_SIZE": world(), "torch": str(torch.__version__)}
        post["value"] = gather(result)
    except Exception as raised:
        post["problem"], error = str(raised) or type(raised).__name__, raised
    posts = _exchange(post, seconds) if world() > 1 else [post]
    if world() > 1 and (problem := _find_problem(posts)):
        leave()
        if error is None or isinstance(error, InputError):
            raise PeerError(problem) from None
    if error is not None:
        raise error
    return result, [post["value"] for post in posts]


def _exchange(post: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Return the posts of all ranks, in order. Rank 0 collects them, so that each rank reads one key."""
    global _exchanges
    _exchanges += 1
    key, shared = f"millrace/{_exchanges}", store()
    shared.set(f"{key}/{rank()}", json.dumps(post))
    if rank() == 0:
        posts = [wait_for(shared, f"{key}/{peer}", peer, seconds) for peer in range(world())]
        shared.set(key, f"[{', '.join(posts)}]")
    return json.loads(wait_for(shared, key, 0, seconds))


def leave() -> None:
    """Keep rank 0, which may serve the store, here until the other ranks have read the last exchange, some seconds."""
    shared, key = store(), f"millrace/{_exchanges}/leave"
    if rank():
        shared.set(f"{key}/{rank()}", "")
        return
    with contextlib.suppress(distributed.DistError):
        shared.wait([f"{key}/{peer}" for peer in range(1, world())], timedelta(seconds=NOTICE_SECONDS))


def _find_problem(posts: list[dict[str, Any]]) -> str:
    """Return the first problem of the posts in one line, or an empty string."""
    problems = [post["problem"] for post in posts]
    if any(problems):
        source = next(peer for peer, problem in enumerate(problems) if problem)
        same = len(set(problems)) == 1
        return problems[source] if same else f"rank {source} on {posts[source]['host']}: {problems[source]}"
    first = posts[0]
    for peer, post in enumerate(posts):
        for key in sorted(first["facts"].keys() | post["facts"].keys()):
            a, b = first["facts"].get(key), post["facts"].get(key)
            if a != b:
                return (
                    f"{key}: rank 0 on {first['host']} has {a!r}, rank {peer} on {post['host']} {b!r}: "
                    "give all ranks the same"
                )
    return ""
