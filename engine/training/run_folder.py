"""The run folder: claimed by one run at a time, cleared of a killed run's remains, with the settings in config.yaml."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from engine.checkpoint import storage
from engine.config.settings import Settings
from engine.parallel.rendezvous import rank
from pipeline.system.errors import InputError


class RunFolder:
    """The folder that `settings.out` names. Rank 0 alone writes there."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.path = Path(settings.out)
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Make the folder, lock it, and remove the remains of a killed run. Raises InputError."""
        with _as_input_error(self._settings):
            if self._lock is None:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(self.path)
                storage.clear_up(self.checkpoints)
                for unfinished in self.path.glob(".writing-*"):
                    unfinished.unlink()
        refuse_existing_run(self._settings)

    def write_config(self) -> None:
        """Write the settings to config.yaml, from which the run can be repeated. Raises InputError."""
        with _as_input_error(self._settings):
            replace(self._settings, resume="", allow_change=[]).write(self.path / "config.yaml")

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()


def check_out(settings: Settings) -> None:
    """Raise InputError, on rank 0, where the run folder cannot be written, is locked, or contains another run."""
    if rank():
        return
    out = Path(settings.out)
    with _as_input_error(settings):
        existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise OSError(errno.ENOTDIR, "")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "")
        if (out / ".lock").exists():
            _lock(out).close()
    refuse_existing_run(settings)


def refuse_existing_run(settings: Settings) -> None:
    """Raise InputError where the run folder has checkpoints, and is not to be resumed."""
    if not settings.resume and any((Path(settings.out) / "checkpoints").glob("step_*")):
        remedy = 'add --resume auto (in Python, resume="auto") to resume it, or choose another --out'
        raise InputError(f"{settings.out}: already holds a run: {remedy}")


def _lock(out: Path) -> IO[str]:
    """Return a file whose lock keeps other runs out of the folder; the system releases it with the process."""
    file = open(out / ".lock", "w")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{out}: another run is writing into it: choose another --out, or end that run") from None
    return file


@contextlib.contextmanager
def _as_input_error(settings: Settings) -> Iterator[None]:
    """Raise InputError for an OSError in this context."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or errno.EINVAL)
        raise InputError(f"out {settings.out!r}: {reason}: choose another folder") from None
