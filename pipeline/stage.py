"""Copy a beton and its manifest to a local disk, once:  python -m pipeline.stage /shared/train.beton /local/disk

For data on a shared file system that many machines read again and again. A copy that is there already, of the same
size, table and CRCs, is kept; any other is replaced once the new one is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.beton import Beton, manifest_path, own_manifest
from pipeline.system.errors import InputError, command
from pipeline.system.progress import tqdm

_BLOCK = 1 << 24


def stage(source: Path, folder: Path, *, quiet: bool = False) -> Path:
    """Copy the beton `source` and its manifest into `folder`; return the copy's path.

    Written beside and renamed: a crash leaves no half a copy under its name. Of several processes that stage into one
    folder at once, the first copies and the others wait for it. Raises InputError where the source is no beton or
    cannot be read, or there is no room.
    """
    wanted, target = Beton(source), folder / source.name
    if target.exists() and target.resolve() == source.resolve():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _same(wanted, target):
                _replace(source, target, quiet=quiet)
    except OSError as error:
        where, other = (source, "see to it") if _is_of(error, source) else (folder, "choose another folder")
        raise InputError(f"{where}: {error.strerror or error}: {other}") from None
    if not _same(wanted, target):
        raise InputError(f"{target}: is not the same as {source}, which changed meanwhile: stage it again")
    return target


def _same(wanted: Beton, path: Path) -> bool:
    """Return whether there is a beton at `path` with the same size, header, tables and records' CRCs."""
    try:
        return path.stat().st_size == wanted.path.stat().st_size and Beton(path).fingerprint == wanted.fingerprint
    except (OSError, InputError):
        return False


def _replace(source: Path, target: Path, *, quiet: bool) -> None:
    """Put copies of a beton and its manifest in the place of what is there, once both are whole."""
    pairs = [(source, target)]
    if own_manifest(source).exists():
        pairs.append((own_manifest(source), manifest_path(target)))
    besides = [_beside(copy) for _, copy in pairs]
    try:
        for path in {_beside(target), _beside(manifest_path(target))}:
            path.unlink(missing_ok=True)  # of a process that was killed
        needed, free = sum(path.stat().st_size for path, _ in pairs), shutil.disk_usage(target.parent).free
        if free < needed:
            raise InputError(
                f"{target.parent}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: choose another folder"
            )
        for (path, _), beside in zip(pairs, besides, strict=True):
            _copy(path, beside, quiet=quiet)
        manifest_path(target).unlink(missing_ok=True)  # it does not fit the new one
        for (_, copy), beside in zip(pairs, besides, strict=True):
            os.replace(beside, copy)
    finally:
        for beside in besides:
            beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes that stage into `folder` waiting meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_of(error: OSError, source: Path) -> bool:
    return getattr(error, "filename", None) in (str(source), str(own_manifest(source)))


def _copy(source: Path, beside: Path, *, quiet: bool) -> None:
    with source.open("rb") as read, beside.open("xb") as write:  # never through a link that was planted
        every = 0.1 if sys.stderr.isatty() else 30.0  # seconds between two states of progress
        size = source.stat().st_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=source.name, disable=quiet, mininterval=every) as bar:
            while block := _read(read, source):
                write.write(block)
                bar.update(len(block))
        write.flush()
        os.fsync(write.fileno())


def _read(file: IO[bytes], source: Path) -> bytes:
    try:
        return file.read(_BLOCK)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(source)) from None


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.stage", description="Copy a beton to a local disk.")
    parser.add_argument("source", type=Path, metavar="BETON", help="beton on a shared file system")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="on a local disk")
    args = parser.parse_args()
    print(stage(args.source, args.folder))


if __name__ == "__main__":
    main()
