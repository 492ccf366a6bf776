"""Copy a beton and its manifest to a local disk, once:  python -m pipeline.stage /shared/train.beton /local/disk

For data on a shared file system that many machines read again and again. A copy that is there already, of the same
size and table, is kept; any other is replaced once the new one is whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from pipeline.beton import Beton, manifest_path
from pipeline.errors import InputError, command

_BLOCK = 1 << 24


def stage(source: Path, folder: Path, *, quiet: bool = False) -> Path:
    """Copy the beton `source` and its manifest into `folder`; return the copy's path.

    Written beside and renamed: a crash leaves no half a copy under its name. Raises InputError where the source is no
    beton, or there is no room.
    """
    wanted, target = Beton(source), folder / source.name
    if target.exists() and target.resolve() == source.resolve():
        return target
    if _same(wanted, target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(folder).free, source.stat().st_size
        if free < needed:
            raise InputError(
                f"{folder}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: choose another folder"
            )
        if manifest_path(source).exists():
            _copy(manifest_path(source), manifest_path(target), quiet=True)
        _copy(source, target, quiet=quiet)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}: choose another folder") from None
    if not _same(wanted, target):
        raise InputError(f"{target}: is not the same as {source}, which changed meanwhile: stage it again")
    return target


def _same(wanted: Beton, path: Path) -> bool:
    """Return whether there is a beton at `path` with the same size, header and tables."""
    try:
        return path.stat().st_size == wanted.path.stat().st_size and Beton(path).fingerprint == wanted.fingerprint
    except (OSError, InputError):
        return False


def _copy(source: Path, target: Path, *, quiet: bool) -> None:
    beside = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        with source.open("rb") as read, beside.open("wb") as write:
            size = source.stat().st_size
            silent = quiet or not sys.stderr.isatty()
            with tqdm(total=size, unit="B", unit_scale=True, desc=target.name, disable=silent) as bar:
                while block := read.read(_BLOCK):
                    write.write(block)
                    bar.update(len(block))
            write.flush()
            os.fsync(write.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.stage", description="Copy a beton to a local disk.")
    parser.add_argument("source", type=Path, metavar="BETON", help="beton on a shared file system")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="on a local disk")
    args = parser.parse_args()
    print(stage(args.source, args.folder))


if __name__ == "__main__":
    main()
