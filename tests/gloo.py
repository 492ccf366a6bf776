"""Runs a function on several CPU ranks that communicate over gloo."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

from engine.parallel import consensus, rendezvous
from pipeline.system import logs
from tests import processes

_LIMIT_SECONDS = 300


def on_ranks(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)`, of module level, on `world` ranks, set up as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [
        processes.call(_run, function, arguments, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        deadline = time.monotonic() + _LIMIT_SECONDS
        while None in (statuses := [rank.poll() for rank in ranks]) and not any(statuses):
            assert time.monotonic() < deadline, f"ranks still run after {_LIMIT_SECONDS} s"
            time.sleep(0.01)
        if any(statuses):
            time.sleep(1)  # others may fail for the same reason
    finally:
        for rank in ranks:
            rank.kill()
    failed = {number: rank.communicate()[1] for number, rank in enumerate(ranks) if statuses[number]}
    assert not failed, "\n".join(f"rank {number} failed:\n{err}" for number, err in failed.items())


def _run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logs.configure()
    function(*arguments)
    if rendezvous._store is not None:
        consensus.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
