"""The run folder: claimed, locked, cleared of what a killed run left."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO

from engine.checkpoint import storage
from engine.config.settings import Settings
from engine.parallel.rendezvous import rank
from engine.training.build import Run
from pipeline.system.errors import InputError


def begin(run: Run) -> None:
    """Make the run folder and start the trackers. Raises InputError where the folder cannot be made."""
    settings = run.settings
    if run.accelerator.is_main_process:
        try:
            claim(run)
            replace(settings, resume="", allow_change=[]).write(run.out / "config.yaml")
        except OSError as error:
            raise InputError(f"out {settings.out!r}: {error.strerror or error}: choose another folder") from None
        print(f"data.backend: {run.backend.name} ({run.backend.why})", file=sys.stderr)
        if settings.compile:
            print("compile: the first steps, and those of each new size, take a minute or more", file=sys.stderr)
    if settings.tracker != "none":
        run.accelerator.init_trackers("millrace")


def claim(run: Run) -> None:
    """Make the run folder, keep other runs out of it, and clear up what one that was killed left there."""
    if run.lock is None:
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = _lock(run.out)
        storage.clear_up(run.out / "checkpoints")


def _lock(out: Path) -> IO[str]:
    """Return a file whose lock keeps a second run out of the folder; the system releases it with the process."""
    file = open(out / ".lock", "w")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{out}: another run is writing into it: choose another --out, or end that run") from None
    return file


def check_out(settings: Settings) -> None:
    """Raise InputError, on the first process, where the run folder cannot be written, or another run has it."""
    if rank():
        return
    out = Path(settings.out)
    try:
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        problem = 0 if there.is_dir() else errno.ENOTDIR
        if not problem and not os.access(there, os.W_OK | os.X_OK):
            problem = errno.EACCES
        if (out / ".lock").exists():
            _lock(out).close()
    except OSError as error:
        problem = error.errno or errno.EINVAL
    if problem:
        raise InputError(f"out {settings.out!r}: {os.strerror(problem)}: choose another folder")
    if not settings.resume and any((out / "checkpoints").glob("step_*")):
        raise InputError(f"{out}: already holds a run: add --resume auto to go on with it, or choose another --out")
