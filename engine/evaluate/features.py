"""Features of all images, center-cropped, to a file: `.npy` with ids and labels next to it, or one `.safetensors`.

Rows are written as they are computed; after an interruption the same command resumes.
"""

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from safetensors.torch import save_file

from engine.evaluate import classification
from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.evaluation import shard
from engine.evaluate.resume import load_cached, save_cached, valid_ids
from engine.parallel import collectives
from engine.parallel.consensus import all_gather_object, run_on_all_ranks
from pipeline.system.errors import InputError, describe_error
from pipeline.system.files import atomic_path, replace_synced, write_json

logger = get_logger(__name__)

_SAVE_EVERY_BATCHES = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of features. `--out` is a file here, as this evaluation has no other result."""
    classification.add_arguments(parser)
    out = "FILE.npy or FILE.safetensors, not a folder (default: features.npy in RUN/evaluation or FILE.evaluation)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)


def run(args: argparse.Namespace) -> None:
    """Write the features of all images of --train, and their ids and labels."""
    file = args.out
    if file:
        if file.suffix not in (".npy", ".safetensors"):
            raise InputError(f"--out {file}: name a file that ends in .npy or .safetensors")
        args.out = file.parent
    evaluation = classification.build(args, labeled=False)
    file = file or evaluation.out / "features.npy"
    partial = file.with_name(f".{file.name}.partial.npy")
    ids = _compute(evaluation, partial)
    evaluation.check_frozen()
    run_on_all_ranks(lambda: _finish(evaluation, partial, file, ids) if evaluation.is_main else None)
    logger.info("written: %s, %d features of %d dimensions", file, len(ids), evaluation.backbone.features)


def _compute(evaluation: ClassificationEvaluation, partial: Path) -> np.ndarray:
    """Write this rank's rows to the shared file `partial`; return the ids of the records, of all ranks."""
    local = shard(evaluation.train)
    position = partial.with_suffix(f".{collectives.rank()}of{collectives.world()}.safetensors")
    shape, settings = (len(evaluation.train), evaluation.backbone.features), evaluation.settings()
    ids = resume(partial, position, shape, settings)
    rows = np.lib.format.open_memmap(partial, "r+")

    def save() -> None:
        rows.flush()
        save_cached(position, settings, {"ids": torch.tensor(ids, dtype=torch.int64)})

    if len(ids) < len(local):
        loader = evaluation.center_loader(evaluation.train, local[len(ids) :])
        with contextlib.closing(loader), torch.no_grad():
            for number, (images, batch_ids) in enumerate(evaluation.progress(loader, "batches"), start=1):
                first = local[0] + len(ids)
                rows[first : first + len(batch_ids)] = evaluation.embed(images).cpu().numpy()
                ids += batch_ids.tolist()
                if number % _SAVE_EVERY_BATCHES == 0:
                    save()
    save()
    return evaluation.gather(torch.tensor(ids, device=evaluation.device), evaluation.train).cpu().numpy()


def resume(partial: Path, position: Path, shape: tuple[int, int], settings: dict[str, object]) -> list[int]:
    """Return the ids of the rows of this rank that are in `partial`.

    If the file or a rank's position in it is missing or does not fit, all ranks begin with an empty file.
    """

    def fits(tensors: dict[str, torch.Tensor]) -> bool:
        return valid_ids(tensors.get("ids"), shape[0])

    cached = load_cached(position, settings, fits) if _has_rows(partial, shape) else None
    if all(all_gather_object(lambda: cached is not None)):
        return cached["ids"].tolist() if cached else []

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise InputError(f"{partial}: cannot be written ({describe_error(error)}): choose another --out") from None

    no_ids = {"ids": torch.zeros(0, dtype=torch.int64)}
    run_on_all_ranks(lambda: attempt(lambda: save_cached(position, settings, no_ids)))
    run_on_all_ranks(lambda: attempt(lambda: _create(partial, shape)) if collectives.rank() == 0 else None)
    return []


def _has_rows(partial: Path, shape: tuple[int, int]) -> bool:
    """Return whether the file contains rows of that shape. Maps it, without reading."""
    try:
        rows = np.lib.format.open_memmap(partial, "r") if partial.is_file() else np.zeros(0)
    except (OSError, ValueError):
        return False
    return rows.shape == shape and rows.dtype == np.float32


def _create(partial: Path, shape: tuple[int, int]) -> None:
    """Create the file of rows, at its final size. Raises OSError if the disk has no room for it."""
    with atomic_path(partial) as temporary:
        np.lib.format.open_memmap(temporary, "w+", np.float32, shape).flush()
        with open(temporary, "r+b") as file:  # reserves disk: later writes through memory raise no error
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)


def _finish(evaluation: ClassificationEvaluation, partial: Path, file: Path, ids: np.ndarray) -> None:
    """Write ids, labels and settings, and last move the rows to the result file. Raises OSError."""
    labels = evaluation.train.labels[ids]
    about = evaluation.settings(checkpoint=str(evaluation.encoder.path), data=str(evaluation.train.path))
    if file.suffix == ".safetensors":
        rows = np.lib.format.open_memmap(partial, "r")
        arrays = {"features": np.array(rows), "ids": ids, "labels": labels}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with atomic_path(file) as temporary:
            save_file(tensors, temporary, metadata={key: str(value) for key, value in about.items()})
        partial.unlink()
    else:
        for name, array in {"ids": ids, "labels": labels}.items():
            with atomic_path(file.with_suffix(f".{name}.npy")) as temporary:
                np.save(temporary, array)
        write_json(file.with_suffix(".json"), about)
        replace_synced(partial, file)
    for leftover in partial.parent.glob(f"{partial.stem}.*of*.*"):
        leftover.unlink()
