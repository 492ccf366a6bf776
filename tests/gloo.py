"""Runs a function on several CPU ranks that communicate over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing

from engine.parallel import consensus, rendezvous
from pipeline.system import logs

# Ranks are forked from a process that has imported all this and done nothing yet. (Optimizers import torch._dynamo.)
multiprocessing.set_forkserver_preload(["accelerate", "torch.distributed", "torch._dynamo", "engine.run"])


def on_ranks(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)`, of module level, on `world` ranks, set up as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_run, (world, port, function, arguments), world, start_method="forkserver")


def _run(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    logs.configure()
    function(*arguments)
    if rendezvous._store is not None:
        consensus.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
