"""Torch's threads on the CPU: this rank's share of the cores, unless the user has set OMP_NUM_THREADS.

`accelerate launch` sets OMP_NUM_THREADS for every process it starts, to 1 where the user has set none; torchrun does so
for two ranks and more.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.logging import get_logger

from engine.parallel.rendezvous import cores_per_rank
from pipeline.system.text import counted

logger = get_logger(__name__)

_VARIABLE = "OMP_NUM_THREADS"
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch, by torchrun
_OPTION = "__num_cpu"  # of accelerate launch: --num_cpu_threads_per_process and its abbreviations


class Launcher(NamedTuple):
    """The environment that the launcher was started with, and its command line."""

    environment: Mapping[str, str]
    command: Sequence[str]


def read_launcher() -> Launcher | None:
    """Return the parent process as /proc has it from its start; None where that cannot be read."""

    def fields(name: str) -> list[str]:
        return os.fsdecode(Path(f"/proc/{os.getppid()}", name).read_bytes()).split("\0")[:-1]

    try:
        environment = dict(field.partition("=")[::2] for field in fields("environ"))
        return Launcher(environment, fields("cmdline"))
    except OSError:
        return None


def is_set_by_launcher(environment: Mapping[str, str], launcher: Launcher | None) -> bool:
    """Return whether OMP_NUM_THREADS is the launcher's value and not the user's.

    It is where a launcher started this process directly, without the variable in its own environment and without the
    option for it. In doubt (another program between the two, no /proc) the value counts as the user's.
    """
    if launcher is None or _VARIABLE not in environment or not any(name in environment for name in _LAUNCHED):
        return False
    chosen = any(word.replace("-", "_").startswith(_OPTION) for word in launcher.command)
    return _VARIABLE not in launcher.environment and not chosen


def choose_threads(environment: Mapping[str, str], launcher: Launcher | None, share: int, default: int) -> int | None:
    """Return the number of torch's threads; None to leave it to the user, who has set OMP_NUM_THREADS.

    share: this rank's cores. default: torch's threads without the variable, which may be fewer than the cores.
    """
    if is_set_by_launcher(environment, launcher):
        return share
    return None if _VARIABLE in environment else min(default, share)


@contextlib.contextmanager
def share_of_cores() -> Iterator[None]:
    """Have torch compute with this rank's share of the cores after the block, which sets up Accelerate; log a change.

    Without OMP_NUM_THREADS Accelerate sets a thread a physical core on several ranks, whatever the limits.
    """
    before = torch.get_num_threads()
    threads = choose_threads(os.environ, read_launcher(), cores_per_rank(), before)
    yield
    if threads is not None:
        torch.set_num_threads(threads)
        if threads != before:
            cores = f"{counted(threads, 'thread')}, not {before}: this rank's share of the cores"
            logger.info(f"computing with {cores}; set {_VARIABLE} to choose another number")
