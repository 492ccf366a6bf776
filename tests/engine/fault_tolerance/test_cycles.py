"""Runs that are begun and killed leave nothing behind that grows: files, shared memory, processes."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
from scipy import stats

from engine.checkpoint import storage
from engine.monitoring import loss_spikes
from tests.conftest import Figure
from tests.engine.fault_tolerance.test_stops import arguments_of, seconds_of
from tests.engine.test_run import SMALL, main

CYCLES = 100


def left(out: Path) -> dict[str, int]:
    """Count what there is of these runs, and of their shared memory on the machine."""
    own = psutil.Process()
    running = [process for process in own.children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE]
    return {
        "files": sum(len(files) for _, _, files in os.walk(out)),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.name != "metrics.jsonl"),
        "MiB of shared memory": psutil.virtual_memory().shared // 2**20,
        "processes": len(running),
        "open files": own.num_fds(),
    }


def remaining(before: set[str], seconds: float = 120) -> set[str]:
    """Return the shared memory that was not there before, and is not gone after so long, as what is in use is."""
    found, until = set(os.listdir("/dev/shm")) - before, time.monotonic() + seconds
    while found and time.monotonic() < until:
        time.sleep(1)
        found &= set(os.listdir("/dev/shm"))
    return found


def losses_kept(out: Path) -> int:
    """Return how many losses the newest checkpoint holds: up to a limit, more with every step."""
    newest, _ = storage.newest(out / "checkpoints")
    return len(storage.read_state(newest)["monitor"]["spikes"]["window"]) if newest else 0


def growth(counted: list[int]) -> float:
    """Return by how much a count grows a cycle: the least of its last third less that of its first.

    What one kill leaves half written, which the next start clears up, is in some cycles, and so not in the least.
    """
    third = len(counted) // 3
    return (min(counted[-third:]) - min(counted[:third])) / (len(counted) - third)


def test_what_stays_is_growth_and_what_the_next_start_clears_up_is_not() -> None:
    draw = random.Random(0)
    assert growth([100 + draw.choice([0, 0, 40]) for _ in range(60)] + [140] * 20 + [100] * 10) == 0
    assert growth([100 + number + draw.choice([0, 0, 40]) for number in range(90)]) == pytest.approx(1, abs=0.1)
    assert growth([100] * 45 + [101] * 45) > 0


@pytest.mark.slow
@pytest.mark.reliability
def test_a_hundred_runs_that_are_killed_leave_nothing_that_grows(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """Each goes on from what the one before it had saved, or fails to begin."""
    out, draw, counted = tmp_path / "out", random.Random(0), []
    arguments = [*arguments_of(drawn, out), "--optim.epochs", "100000", "--save_every", "1", "--keep", "2"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    while losses_kept(out) < loss_spikes.WINDOW:
        seconds_of(arguments, 20.0, temporary)
    before, files = set(os.listdir("/dev/shm")), set(os.listdir(temporary))
    for _ in range(CYCLES):
        seconds_of(arguments, draw.uniform(0.2, 4.0), temporary)
        counted.append(left(out))
    assert (out / "checkpoints" / "latest").exists()
    found = {name: growth([count[name] for count in counted]) for name in counted[0]}
    found |= {"/dev/shm": float(len(remaining(before))), "temporary": float(len(set(os.listdir(temporary)) - files))}
    figure(
        "100 start–kill cycles",
        f"growth a cycle over {CYCLES}: " + ", ".join(f"{name} {value:g}" for name, value in found.items()),
    )
    assert abs(found.pop("bytes")) < 1  # the number of a step is written out
    assert found == dict.fromkeys(found, 0.0), (counted[0], counted[-1])


def slope(values: list[float]) -> tuple[float, float, float]:
    """Return by how much values grow each time, and the 95 % interval: the median slope of all pairs (Theil, Sen).

    What the allocator takes once, for whatever reason, is no growth by that measure, as it would be by least squares.
    """
    found = stats.theilslopes(values)
    return float(found.slope), float(found.low_slope), float(found.high_slope)


EPOCHS_EACH, RESUMES = 8, 30


@pytest.mark.slow
@pytest.mark.reliability
def test_one_process_that_trains_and_resumes_for_long_does_not_grow(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """Memory after each resume; the first third, in which caches fill, is left out."""
    arguments = ["--data.train", str(drawn), "--data.eval", str(drawn), *SMALL, "--out", str(tmp_path)]
    arguments += ["--resume", "auto", "--allow-change", "optim.epochs", "--log_every", "5"]
    counted = []
    for number in range(1, RESUMES + 1):
        assert main(monkeypatch, *arguments, "--optim.epochs", str(number * EPOCHS_EACH)) == 0
        gc.collect()
        counted.append(psutil.Process().memory_info().rss / 2**20)
    settled = counted[RESUMES // 3 :]
    grows, least, most = slope(settled)
    each = f"{grows:+.3f} ({least:+.3f} to {most:+.3f}) MiB a resume"
    said = f"one process, {RESUMES} resumes, {RESUMES * EPOCHS_EACH} epochs: {each}"
    figure("100 start–kill cycles", f"{said}, {settled[-1] - settled[0]:+.1f} in all, of {settled[-1]:.0f}")
    assert grows < 0.05, counted
    assert settled[-1] - settled[0] < 8, counted


def test_starts_that_fail_leave_nothing_behind(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is built, by what is built, and by what is to be resumed."""
    whole = ["--data.train", str(drawn), *SMALL, "--out", str(tmp_path / "whole"), "--knn.every", "0"]
    assert main(monkeypatch, *whole, "--optim.epochs", "1") == 0
    bad = [
        [*whole, "--data.batch", "1"],
        [*whole, "--data.batch", "201"],
        [*whole, "--data.backend", "dali", "--data.batch", "300"],
        [*whole, "--resume", "auto", "--optim.epochs", "2"],
    ]
    counted = []
    for _ in range(6):
        assert {main(monkeypatch, *arguments) for arguments in bad} == {2}
        gc.collect()
        counted.append((threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/dev/shm"))))
    assert "resume with its own" in capsys.readouterr().err
    assert counted[-1] == counted[1]
