"""Errors that a user can mend, and how a command reports them."""

from __future__ import annotations

import errno
import functools
import os
import sys
import unicodedata
from collections.abc import Callable

_LONGEST = 200  # characters of an error that another one quotes
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class InputError(ValueError):
    """Input that a user can mend. The message says what is wrong, where, and the remedy, in one line."""


class BadRecords(InputError):
    """Records whose place or size cannot be right; `faults` lists sample ids and what is wrong with each."""

    def __init__(self, message: str, faults: list[tuple[int, str]]) -> None:
        super().__init__(message)
        self.faults = faults


class DamagedRecord(InputError):
    """Records whose bytes are not the ones that were written, or do not decode: the message is of the first."""

    def __init__(self, message: str, samples: tuple[int, ...]) -> None:
        super().__init__(message)
        self.samples = samples


class RunFailed(RuntimeError):
    """A failure of the run itself, which nothing in its input explains. The message says what happened, in one line."""


class LoaderStalled(RunFailed):
    """No batch arrived within the stall timeout."""


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Make `main` a command, whose failures are one line on stderr.

    Exit status 2 for an `InputError`, 1 for a failure of the run itself or of a disk, 130 for Ctrl-C.
    """

    @functools.wraps(main)
    def run() -> None:
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
            print("interrupted", file=sys.stderr)
            status = 130
        sys.exit(status)

    return run


def tell(line: str) -> None:
    """Print a line to stderr; where the disk that takes it is full, the line is lost, and nothing else."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise


def report(error: Exception, status: int) -> int:
    """Print one line that says what went wrong, where it did; return `status`."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and getattr(error, "reported", False):
        return status  # the first process says it
    who = "error" if rank == "0" else f"error in process {rank}"
    print(printable(f"{who}: {' '.join(str(error).split())}"), file=sys.stderr)
    return status


def describe_error(error: BaseException) -> str:
    """Return what an error says in one line of at most 200 characters; of the system's, without number and path."""
    said = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST else said[:_LONGEST] + " ..."


def printable(text: str) -> str:
    """Return `text` in one line, with all that is not text escaped: control characters, bytes that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else ascii(letter)[1:-1]
        for letter in text
    )
