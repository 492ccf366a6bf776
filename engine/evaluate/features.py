"""Features of all images, center-cropped, to a file: `.npy` with ids beside, or one `.safetensors`.

They are written as they are computed; a command that was broken off goes on where it was when it is given again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from engine.evaluate.classification import Bench
from engine.parallel import collectives
from engine.parallel.consensus import run_on_all_ranks
from pipeline.loader import CenterLoader
from pipeline.system.errors import InputError
from pipeline.system.files import write_atomic, write_json
from pipeline.system.limits import LIST_BYTES, read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of features."""
    parser.add_argument("--to", type=Path, metavar="FILE", help=".npy or .safetensors (default: OUT/features.npy)")


def run(bench: Bench) -> None:
    """Write the features of all images of --train, and their ids and labels."""
    to = bench.args.to or bench.out / "features.npy"
    run_on_all_ranks(lambda: _check(to))
    partial = to.with_name(f".{to.name}.partial.npy")
    ids = _written(bench, partial)
    bench.check_frozen()
    run_on_all_ranks(lambda: _finish(bench, partial, to, ids) if bench.first else None)
    bench.say(f"written: {to}, {len(bench.train)} features of {bench.backbone.features}")


def _check(to: Path) -> None:
    if to.suffix not in (".npy", ".safetensors"):
        raise InputError(f"--to {to}: name a file that ends in .npy or .safetensors")
    if not to.parent.is_dir():
        raise InputError(f"--to {to}: there is no folder {to.parent}: make it first")


def _written(bench: Bench, partial: Path) -> np.ndarray:
    """Write this process's rows to the shared file; return the ids that were read, of all processes."""
    shares = collectives.shares(np.arange(len(bench.train)))
    own = shares[collectives.rank()]
    position = partial.with_suffix(f".{collectives.rank()}of{collectives.world()}.json")
    shape, settings = (len(bench.train), int(bench.backbone.features)), bench.settings()  # type: ignore[arg-type]
    run_on_all_ranks(lambda: _make(partial, position, shape, settings))
    rows = np.lib.format.open_memmap(partial, "r+")
    read = _read(position, settings, len(bench.train), len(own)) or []
    batch = bench.args.batch or 256
    if len(read) < len(own):
        options = {"share": bench.share, **bench.loading(bench.train)}
        images = CenterLoader(bench.train, indices=own[len(read) :], batch=batch, **options)
        try:
            with torch.no_grad():
                for number, (views, ids) in enumerate(bench.shown(images, "batches"), start=1):
                    at = own[0] + len(read)
                    rows[at : at + len(ids)] = bench.embed(views).cpu().numpy()
                    read += ids.tolist()
                    if number % 50 == 0:
                        rows.flush()
                        _note(position, settings, read)
        finally:
            images.close()
    rows.flush()
    _note(position, settings, read)
    counts = [len(share) for share in shares]
    return collectives.gather_uneven(torch.tensor(read, device=bench.device), counts).cpu().numpy()


def _make(partial: Path, position: Path, shape: tuple[int, int], settings: dict[str, object]) -> None:
    """Make the file and this process's position in it, where there are none of these settings."""
    if _holds(partial, shape) and _read(position, settings, shape[0], shape[0]) is not None:
        return
    beside = partial.with_name(f"{partial.name}.writing")
    try:
        _note(position, settings, [])
        if collectives.rank() == 0:
            np.lib.format.open_memmap(beside, "w+", np.float32, shape).flush()
            with open(beside, "r+b") as file:  # whose rows are written through memory, where no error would be told
                os.posix_fallocate(file.fileno(), 0, beside.stat().st_size)
            os.replace(beside, partial)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}: choose another --to") from None


def _holds(partial: Path, shape: tuple[int, int]) -> bool:
    """Return whether the file is there with rows of that shape; it is mapped, not read."""
    try:
        rows = np.lib.format.open_memmap(partial, "r") if partial.is_file() else np.zeros(0)
    except (OSError, ValueError):
        return False
    return rows.shape == shape and rows.dtype == np.float32


def _read(position: Path, settings: dict[str, object], images: int, most: int) -> list[int] | None:
    """Return the ids that were read, at most so many of so many images; None where they are of other settings."""
    try:
        noted = read_json(position, LIST_BYTES, "remove it")
        read = noted["read"] if noted["settings"] == settings else None
    except (InputError, KeyError, TypeError):
        return None
    if not isinstance(read, list) or len(read) > most:
        return None
    return read if all(type(index) is int and 0 <= index < images for index in read) else None


def _note(position: Path, settings: dict[str, object], read: list[int]) -> None:
    write_atomic(position, json.dumps({"settings": settings, "read": read}))


def _finish(bench: Bench, partial: Path, to: Path, ids: np.ndarray) -> None:
    """Move the rows to where they are wanted, with ids, labels and what they are of."""
    labels = bench.train.labels[ids]
    about = bench.settings(checkpoint=str(bench.encoder.path), data=str(bench.train.path))
    if to.suffix == ".safetensors":
        rows = np.lib.format.open_memmap(partial, "r")
        tensors = {"features": torch.from_numpy(np.array(rows)), "ids": torch.from_numpy(ids)}
        metadata = {key: str(value) for key, value in about.items()}
        save_file(tensors | {"labels": torch.from_numpy(labels)}, to, metadata=metadata)
        partial.unlink()
    else:
        os.replace(partial, to)
        np.save(to.with_suffix(".ids.npy"), ids)
        np.save(to.with_suffix(".labels.npy"), labels)
        write_json(to.with_suffix(".json"), about)
    for left in partial.parent.glob(f"{partial.stem}.*of*.json"):
        left.unlink()
