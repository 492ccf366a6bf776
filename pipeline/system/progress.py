"""Progress bars: rate and time left, continuously on a terminal, a line now and then elsewhere."""

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm as tqdm

T = TypeVar("T")

tqdm.set_lock(threading.RLock())  # tqdm's default is also a named semaphore, which a killed process may leave behind


def progress(items: Sequence[T], unit: str, *, quiet: bool = False) -> Iterator[T]:
    """Yield the items, and show on stderr the number done, the rate and the time left."""
    with progress_bar(len(items), unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.update()


def progress_bar(total: int, unit: str, *, quiet: bool = False, done: int = 0) -> tqdm:
    """Return a bar of `total` steps, `done` of them before; its `update(n)` counts n more."""
    terminal = sys.stderr.isatty()
    tqdm.monitor_interval = 0  # without tqdm's thread: the caller may fork worker processes
    interval = 0.5 if terminal else 10.0
    return tqdm(total=total, initial=done, unit=f" {unit}", disable=quiet, mininterval=interval, dynamic_ncols=terminal)
