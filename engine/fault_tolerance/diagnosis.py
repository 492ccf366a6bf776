"""The cause of a failed training, not its symptom: a lost rank, a stalled loader, a GPU's full memory."""

import contextlib
import platform
import re
from collections.abc import Iterator

import torch
from torch import distributed

from engine.fault_tolerance.heartbeat import FAILED, FINISHED, LOST, Heartbeat, LostRank
from engine.fault_tolerance.preemption import Stopped
from engine.fault_tolerance.watchdog import dump_stacks
from engine.parallel.consensus import PeerError
from engine.parallel.rendezvous import rank, world
from pipeline.system.errors import LoaderStalled, RunFailed, describe_error

_ON_ALL_RANKS = (Stopped, PeerError, FloatingPointError)
_LESS_MEMORY = (
    "compute less at once (--micro-batch, or --activation-checkpointing); --dry-run estimates the memory of a run"
)


@contextlib.contextmanager
def translate_failures(heartbeat: Heartbeat) -> Iterator[None]:
    """Raise LostRank, LoaderStalled or, for a GPU's full memory, RunFailed for the failure that caused it.

    Prints every thread's stack for the first two. The other ranks are watched until the context ends.
    """
    try:
        yield
    except BaseException as error:
        cause = diagnose(error, heartbeat, on_all_ranks=isinstance(error, _ON_ALL_RANKS))
        if isinstance(cause, (LoaderStalled, LostRank)):
            dump_stacks(error)
        if isinstance(cause, LoaderStalled):
            place = f"rank {rank()} on {platform.node()}, step {heartbeat.step}"
            cause = LoaderStalled(f"{place}: {error}; the stack of every thread is above")
        if isinstance(cause, torch.OutOfMemoryError):
            reason = describe_error(error).partition(". ")[0]
            cause = RunFailed(f"step {heartbeat.step}, memory of the GPU is full ({reason}): {_LESS_MEMORY}")
        if cause is error:
            raise
        raise cause from error
    finally:
        heartbeat.peers.stop()


def diagnose(error: BaseException, heartbeat: Heartbeat, *, on_all_ranks: bool = False) -> BaseException:
    """Return the LostRank behind an error of a collective, else the error; the other ranks are shown the failure.

    on_all_ranks: every rank meets this error, each in its own time.
    """
    heartbeat.state, text = FINISHED if on_all_ranks else FAILED, str(error)
    collective = isinstance(error, distributed.DistError) or re.search("gloo|nccl|timed out", text, re.IGNORECASE)
    if world() > 1 and collective and isinstance(error, RuntimeError) and not isinstance(error, RunFailed):
        heartbeat.state = LOST
        error = heartbeat.peers.describe(heartbeat.peers.find_silent_ranks(), text.splitlines()[0][:200])
    heartbeat.peers.stop()
    return error
