"""Rank and world size, from the launcher's environment, and the store at which ranks meet before any process group.

Every other module asks here: torch and Accelerate know the rank only once there is a process group.
"""

import logging
import os
import time
import uuid
from datetime import timedelta

from torch import distributed

from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError

logger = logging.getLogger(__name__)

JOIN_SECONDS = 600.0
"""Longest time from the first rank to the last."""
NOTICE_SECONDS = 10.0
"""Wait after which rank 0 logs which rank has not answered."""
_store: distributed.Store | None = None


def world() -> int:
    """Return the world size: the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK", "0"))


def local_world() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def local_rank() -> int:
    """Return the number of this process among the ranks on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cores_per_rank() -> int:
    """Return this rank's share of the machine's cores."""
    return max(1, available_cores() // local_world())


def store() -> distributed.Store:
    """Return the launcher's store, under a prefix that only the ranks of this launch know."""
    global _store
    if _store is None:
        shared, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        _store = distributed.PrefixStore(_agree_on_prefix(shared), shared)
    return _store


def _agree_on_prefix(shared: distributed.Store) -> str:
    """Return a prefix that these ranks have agreed on.

    After a restart torchrun's store still contains the keys of the ended ranks. So rank 0 calls with a new random name
    and believes answers to that name alone; each other rank believes a confirmation of its own new name alone.
    """
    name = uuid.uuid4().hex
    if rank() == 0:
        shared.set(f"millrace/{name}/world", str(world()))
        shared.set("millrace/call", name)
        for peer in range(1, world()):
            answer = wait_for(shared, f"millrace/{name}/answer/{peer}", peer)
            shared.set(f"millrace/{name}/confirmed/{answer}", "")
        return name
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        call = wait_for(shared, "millrace/call", 0)
        if rank() >= (size := int(wait_for(shared, f"millrace/{call}/world", 0))):
            raise InputError(f"WORLD_SIZE: rank 0 has {size}, rank {rank()} {world()}: give all ranks the same")
        shared.set(f"millrace/{call}/answer/{rank()}", name)
        try:
            shared.wait([f"millrace/{call}/confirmed/{name}"], timedelta(seconds=1))
        except distributed.DistError:
            continue  # an old call, or other ranks are still to come
        return call
    raise InputError(f"rank 0 of {world()} did not answer for {JOIN_SECONDS:g} s: see its own output")


def wait_for(shared: distributed.Store, key: str, source: int, seconds: float = JOIN_SECONDS) -> str:
    """Return the value that rank `source` sets at `key`; rank 0 logs once which rank it waits for.

    Raises InputError after `seconds`, or where the store is gone.
    """
    begin, noticed = time.monotonic(), False
    while True:
        asked = time.monotonic()
        try:
            shared.wait([key], timedelta(seconds=NOTICE_SECONDS))
            return shared.get(key).decode()
        except distributed.DistError:
            waited, store_gone = time.monotonic() - begin, time.monotonic() - asked < 0.9 * NOTICE_SECONDS
            if waited > seconds or store_gone:
                raise InputError(
                    f"rank {source} of {world()} has not answered for {waited:.0f} s: see its own output, and check "
                    "that each machine reaches the first"
                ) from None
        if rank() == 0 and not noticed:
            logger.info(f"waiting for rank {source} of {world()}")
            noticed = True
