"""Where ranks meet before any process group exists: the launcher's environment and its store."""

from __future__ import annotations

import os
import sys
import time
import uuid
from datetime import timedelta

from torch import distributed

from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError

PATIENCE = timedelta(minutes=10)
"""From the first process to the last."""
SLICE = timedelta(seconds=10)
"""After which the first process says whom it waits for."""
_store: distributed.Store | None = None


def world() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among them."""
    return int(os.environ.get("RANK", "0"))


def processes_here() -> int:
    """Return the number of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def cores_here() -> int:
    """Return the cores of this process, of those that the processes on this machine share."""
    return max(1, available_cores() // processes_here())


def store() -> distributed.Store:
    """Return what the processes meet at."""
    global _store
    if _store is None:
        shared, _, _ = next(distributed.rendezvous("env://", timeout=PATIENCE))
        _store = distributed.PrefixStore(_agreed_name(shared), shared)
    return _store


def _agreed_name(shared: distributed.Store) -> str:
    """Return a name that these processes have agreed on, and no others before them.

    After a restart torchrun's store still holds what the ended processes wrote. So the first process calls with a new
    name, and believes answers to that name alone; the others believe what confirms their own new name.
    """
    own = uuid.uuid4().hex
    if rank() == 0:
        shared.set(f"millrace/{own}/world", str(world()))
        shared.set("millrace/call", own)
        for number in range(1, world()):
            other = heard(shared, f"millrace/{own}/answer/{number}", number)
            shared.set(f"millrace/{own}/confirmed/{other}", "")
        return own
    deadline = time.monotonic() + PATIENCE.seconds
    while time.monotonic() < deadline:
        call = heard(shared, "millrace/call", 0)
        if rank() >= (theirs := int(heard(shared, f"millrace/{call}/world", 0))):
            raise InputError(
                f"WORLD_SIZE: process 0 has {theirs}, process {rank()} {world()}: give all processes the same"
            )
        shared.set(f"millrace/{call}/answer/{rank()}", own)
        try:
            shared.wait([f"millrace/{call}/confirmed/{own}"], timedelta(seconds=1))
        except distributed.DistError:
            continue  # an old call, or others are still to come
        return call
    raise InputError(f"process 0 of {world()} did not answer for {PATIENCE.seconds} s: see its own output")


def heard(shared: distributed.Store, key: str, number: int, patience: timedelta = PATIENCE) -> str:
    """Return what process `number` writes at `key`; after a while the first process says whom it waits for."""
    begun, told = time.monotonic(), False
    while True:
        asked = time.monotonic()
        try:
            shared.wait([key], SLICE)
            return shared.get(key).decode()
        except distributed.DistError:
            now = time.monotonic()
            if now - begun > patience.total_seconds() or now - asked < 0.9 * SLICE.seconds:
                break  # the store itself may be gone
        if rank() == 0 and not told:
            print(f"waiting for process {number} of {world()}", file=sys.stderr, flush=True)
            told = True
    raise InputError(
        f"process {number} of {world()} was not heard of for {time.monotonic() - begun:.0f} s: see its own output, and "
        "check that each machine reaches the first"
    )
