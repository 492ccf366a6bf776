"""Progress bars for preparation and verification: rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm as tqdm

T = TypeVar("T")

tqdm.set_lock(threading.RLock())  # its own is one of processes too: a named semaphore, which a killed one may leave


def progress(items: Sequence[T], unit: str, *, quiet: bool = False) -> Iterator[T]:
    """Yield the items, showing how many are done, how many a second, and the time left (on stderr)."""
    terminal = sys.stderr.isatty()
    tqdm.monitor_interval = 0  # no thread of tqdm's own: worker processes may be forked below it
    bar = tqdm(items, unit=f" {unit}", disable=quiet, mininterval=0.5 if terminal else 10.0, dynamic_ncols=terminal)
    return iter(bar)
