"""Runs that are started and killed leave nothing that grows: files, shared memory, processes."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from scipy import stats

import engine.run
from engine.checkpoint import storage
from engine.monitoring import loss_spikes
from tests import processes
from tests.conftest import Figure
from tests.engine.fault_tolerance.test_stops import arguments_of, seconds_of
from tests.engine.test_run import SMALL, main

CYCLES = 100


def count_remains(out: Path) -> dict[str, int]:
    """Count the files and processes of these runs, and the machine's shared memory."""
    process = psutil.Process()
    running = [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    return {
        "files": sum(len(files) for _, _, files in os.walk(out)),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.name != "metrics.jsonl"),
        "MiB of shared memory": psutil.virtual_memory().shared // 2**20,
        "processes": len(running),
        "open files": process.num_fds(),
    }


def leaked_memory(before: set[str], seconds: float = 120) -> set[str]:
    """Return new shared memory that outlives `seconds`, and so is not in use."""
    new, deadline = set(os.listdir("/dev/shm")) - before, time.monotonic() + seconds
    while new and time.monotonic() < deadline:
        time.sleep(1)
        new &= set(os.listdir("/dev/shm"))
    return new


def count_saved_losses(out: Path) -> int:
    """Return the number of losses in the newest checkpoint, which grows up to a limit."""
    newest, _ = storage.newest(out / "checkpoints")
    return len(storage.read_state(newest)["monitor"]["spikes"]["window"]) if newest else 0


def growth(counted: list[int]) -> float:
    """Return the growth of a count per cycle: the minimum of its last third less that of its first.

    Files that a kill leaves half written, and the next start removes, are in some cycles, and so not in the minimum.
    """
    third = len(counted) // 3
    return (min(counted[-third:]) - min(counted[:third])) / (len(counted) - third)


def test_growth_counts_what_stays_alone() -> None:
    draw = random.Random(0)
    assert growth([100 + draw.choice([0, 0, 40]) for _ in range(60)] + [140] * 20 + [100] * 10) == 0
    assert growth([100 + number + draw.choice([0, 0, 40]) for number in range(90)]) == pytest.approx(1, abs=0.1)
    assert growth([100] * 45 + [101] * 45) > 0


@pytest.mark.slow
@pytest.mark.reliability
def test_hundred_killed_runs_leave_nothing_that_grows(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """Each resumes from the last one's checkpoint, or is killed before."""
    out, draw, counted = tmp_path / "out", random.Random(0), []
    arguments = [*arguments_of(drawn, out), "--optim.epochs", "100000", "--save_every", "1", "--keep", "2"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    while count_saved_losses(out) < loss_spikes.WINDOW:
        seconds_of(arguments, 20.0, temporary)
    before, files = set(os.listdir("/dev/shm")), set(os.listdir(temporary))
    for _ in range(CYCLES):
        seconds_of(arguments, draw.uniform(0.2, 4.0), temporary)
        counted.append(count_remains(out))
    assert (out / "checkpoints" / "latest").exists()
    grown = {name: growth([count[name] for count in counted]) for name in counted[0]}
    grown |= {"/dev/shm": float(len(leaked_memory(before)))}
    grown |= {"temporary": float(len(set(os.listdir(temporary)) - files))}
    figure(
        "100 start–kill cycles",
        f"growth a cycle over {CYCLES}: " + ", ".join(f"{name} {value:g}" for name, value in grown.items()),
    )
    assert abs(grown.pop("bytes")) < 1  # the number of a step has more and more digits
    assert grown == dict.fromkeys(grown, 0.0), (counted[0], counted[-1])


def slope(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the growth of values per step, and its 95 % interval: the median slope of all pairs (Theil, Sen).

    Memory that the allocator takes once is no growth by this measure, as it would be by least squares.
    """
    result = stats.theilslopes(values)
    return float(result.slope), float(result.low_slope), float(result.high_slope)


EPOCHS_PER_RESUME, RESUMES = 8, 30


class _MallocInfo(ctypes.Structure):
    _fields_ = [("counts", 10 * ctypes.c_size_t)]


def used_bytes() -> int:
    """Return the bytes that this process has allocated and not freed (glibc's mallinfo2)."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallocInfo
    counts = mallinfo2().counts
    return int(counts[4] + counts[7])  # hblkhd, of mapped blocks, and uordblks


def train_and_resume(arguments: list[str], resumes: int, out: str) -> None:
    """Write to `out` the MiB in use and the resident MiB after each of several resumes."""
    counted = []
    for number in range(1, resumes + 1):
        sys.argv = ["run.py", *arguments, "--optim.epochs", str(number * EPOCHS_PER_RESUME)]
        with pytest.raises(SystemExit, match=r"^0$"):
            engine.run.main()
        gc.collect()
        counted.append((used_bytes() / 2**20, psutil.Process().memory_info().rss / 2**20))
    Path(out).write_text(json.dumps(counted))


@pytest.mark.slow
@pytest.mark.reliability
def test_process_that_trains_and_resumes_for_long_does_not_grow(drawn: Path, tmp_path: Path, figure: Figure) -> None:
    """Memory after each resume; the first third, in which caches fill, is left out.

    In a process of its own: pytest keeps what a test logs.
    """
    arguments = ["--data.train", str(drawn), "--data.eval", str(drawn), *SMALL, "--out", str(tmp_path / "out")]
    arguments += ["--resume", "auto", "--allow-change", "optim.epochs", "--log_every", "5"]
    process = processes.call(train_and_resume, arguments, RESUMES, str(tmp_path / "counted.json"))
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    counted = json.loads((tmp_path / "counted.json").read_text())
    used, resident = zip(*counted[RESUMES // 3 :], strict=True)
    grows, least, most = slope(used)
    rate = f"{grows:+.3f} ({least:+.3f} to {most:+.3f}) MiB in use a resume"
    result = f"one process, {RESUMES} resumes, {RESUMES * EPOCHS_PER_RESUME} epochs: {rate}"
    figure(
        "100 start–kill cycles", f"{result}, {resident[-1] - resident[0]:+.1f} resident in all, of {resident[-1]:.0f}"
    )
    assert grows < 0.05, counted
    assert resident[-1] - resident[0] < 8, counted


def test_failed_starts_leave_nothing_behind(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is built, while building, and by the checkpoint to resume."""
    valid = ["--data.train", str(drawn), *SMALL, "--out", str(tmp_path / "out"), "--knn.every", "0"]
    assert main(monkeypatch, *valid, "--optim.epochs", "1") == 0
    bad = [
        [*valid, "--data.batch", "1"],
        [*valid, "--data.batch", "201"],
        [*valid, "--data.backend", "dali", "--data.batch", "300"],
        [*valid, "--resume", "auto", "--optim.epochs", "2"],
    ]
    counted = []
    for _ in range(6):
        assert {main(monkeypatch, *arguments) for arguments in bad} == {2}
        gc.collect()
        counted.append((threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/dev/shm"))))
    assert "resume with its own" in capsys.readouterr().err
    assert counted[-1] == counted[1]
