"""Errors that a user can mend, and how a command reports them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Input that a user can mend. The message says what is wrong, where, and the remedy, in one line."""


class DamagedRecord(InputError):
    """A record whose bytes are not the ones that were written, or do not decode."""


class LoaderStalled(RuntimeError):
    """No batch arrived within the stall timeout."""


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Make `main` a command: an `InputError` ends it with one line on stderr and exit status 2, Ctrl-C with 130."""

    @functools.wraps(main)
    def run() -> None:
        try:
            status = main() or 0
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        sys.exit(status)

    return run
