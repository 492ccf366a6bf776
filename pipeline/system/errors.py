"""Errors that a user can fix, and how a command reports them."""

import functools
import logging
import os
import sys
from collections.abc import Callable

from pipeline.system import logs
from pipeline.system.files import DISK_ERRORS
from pipeline.system.text import printable

logger = logging.getLogger(__name__)
_MAX_QUOTED = 200  # characters of an error that another one quotes


class InputError(ValueError):
    """Invalid input. The message says in one line what is wrong, where, and the remedy."""


class BadRecords(InputError):
    """Records whose place or size cannot be right. `faults`: sample id and fault of each."""

    def __init__(self, message: str, faults: list[tuple[int, str]]) -> None:
        super().__init__(message)
        self.faults = faults


class DamagedRecord(InputError):
    """Records whose bytes differ from those written, or do not decode. The message names the first of `samples`."""

    def __init__(self, message: str, samples: tuple[int, ...]) -> None:
        super().__init__(message)
        self.samples = samples


class RunFailed(RuntimeError):
    """A failure of the run itself, not of its input. The message says in one line what happened."""


class LoaderStalled(RunFailed):
    """No batch arrived within the stall timeout."""


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Make `main` a command: log lines go to stderr, and a failure is one line there.

    Exit codes: 0 success, or what `main` returns; 1 runtime failure, also of a disk; 2 invalid input; 130 Ctrl-C.
    """

    @functools.wraps(main)
    def run() -> None:
        logs.configure()
        try:
            status = main() or 0
        except InputError as error:
            status = report(error, 2)
        except (FloatingPointError, RunFailed) as error:
            status = report(error, 1)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            where = f"{error.filename}: " if error.filename else ""
            status = report(RunFailed(f"{where}{describe_error(error)}: make room, and give the same command again"), 1)
        except KeyboardInterrupt:
            logger.info("interrupted")
            status = 130
        sys.exit(status)

    return run


def report(error: Exception, status: int) -> int:
    """Print the error as one line on stderr, with the rank unless it is 0; return `status`.

    An error with the attribute `reported` is printed by rank 0 alone.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not getattr(error, "reported", False):
        source = "error" if rank == "0" else f"error in rank {rank}"
        print(printable(f"{source}: {' '.join(str(error).split())}"), file=sys.stderr)
    return status


def describe_error(error: BaseException) -> str:
    """Return an error's message in one line of at most 200 characters; of an OSError, without number and path."""
    message = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return message if len(message) <= _MAX_QUOTED else message[:_MAX_QUOTED] + " ..."
