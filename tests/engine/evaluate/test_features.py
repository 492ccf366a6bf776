"""Features in a file: exact after an interruption, and started again if a part is missing."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from engine.evaluate import features
from engine.evaluate.__main__ import run
from engine.evaluate.classification import ClassificationEvaluation
from engine.evaluate.resume import save_cached
from engine.parallel import collectives
from pipeline.beton import Beton
from pipeline.system.errors import InputError
from tests.gloo import on_ranks


def test_an_interrupted_command_resumes_exactly(encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--size", "32", "--cpu", "--precision", "no", "--workers", "1", "--batch", "2", "--train", str(drawn)]
    expected, file = encoder.parent / "expected.npy", encoder.parent / "file.npy"
    run(["features", str(encoder), *common, "--out", str(expected)])
    embed, calls = ClassificationEvaluation.embed, [0]

    def interrupted(self: ClassificationEvaluation, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 70:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(ClassificationEvaluation, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(["features", str(encoder), *common, "--out", str(file)])
    assert not file.exists()
    run(["features", str(encoder), *common, "--out", str(file)])
    assert calls[0] == 70 + 50  # batches 51 to 100 again: 50 were saved
    assert (np.load(expected) == np.load(file)).all()
    assert np.load(file.with_suffix(".ids.npy")).tolist() == list(range(200))
    assert np.load(file.with_suffix(".labels.npy")).tolist() == Beton(drawn).labels.tolist()
    assert not list(encoder.parent.glob(".*"))


def test_rows_come_last_and_a_failed_write_leaves_the_old_files(
    encoder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, save = encoder.parent / "failed.npy", np.save
    labels = file.with_suffix(".labels.npy")
    labels.write_bytes(b"old")

    def fail(path: Path, array: np.ndarray) -> None:
        if "labels" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array)

    monkeypatch.setattr(np, "save", fail)
    common = ["--size", "32", "--cpu", "--precision", "no", "--workers", "1", "--train", str(drawn)]
    with pytest.raises(OSError, match="No space left"):
        run(["features", str(encoder), *common, "--out", str(file)])
    assert labels.read_bytes() == b"old"
    assert not file.exists()
    assert file.with_name(".failed.npy.partial.npy").exists()  # the same command resumes


def test_out_is_a_file_of_a_known_kind(encoder: Path, drawn: Path) -> None:
    with pytest.raises(InputError, match=r"--out .*features.csv: name a file that ends in .npy or .safetensors"):
        run(["features", str(encoder), "--train", str(drawn), "--out", str(encoder.with_name("features.csv"))])


def _resume_without_the_others_position(folder: str) -> None:
    """Rank 1 has saved its position, rank 0 has not."""
    accelerator = Accelerator(cpu=True)
    partial, position = Path(folder, "x.partial.npy"), Path(folder, f"{collectives.rank()}.safetensors")
    if accelerator.is_main_process:
        np.lib.format.open_memmap(partial, "w+", np.float32, (4, 8))[:] = 1
    else:
        save_cached(position, {}, {"ids": torch.tensor([2, 3])})
    accelerator.wait_for_everyone()
    assert features.resume(partial, position, (4, 8), {}) == []
    assert (np.load(partial) == 0).all()


def test_all_ranks_start_again_if_one_has_to(tmp_path: Path) -> None:
    on_ranks(2, _resume_without_the_others_position, str(tmp_path))
