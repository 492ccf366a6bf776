"""A run that is stopped or killed anywhere, and resumed, equals an undisturbed one bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engine.run
import engine.training.datasets
from engine.checkpoint import storage
from engine.evaluate import online_knn
from engine.evaluate.online_knn import Knn
from engine.fault_tolerance import preemption
from engine.parallel.rendezvous import rank, world
from engine.training import loop
from pipeline.loader import CenterLoader
from tests import processes
from tests.conftest import Figure
from tests.engine.test_run import SMALL, metrics
from tests.gloo import on_ranks

STEPS_PER_EPOCH, EPOCHS = 5, 3


def train(arguments: list[str], stop_after: int = 0) -> None:
    """Train like engine/run.py; the last rank receives SIGTERM after step `stop_after`."""
    sys.argv = ["run.py", *arguments]
    preemption._POLL_SECONDS = 0.0  # ranks exchange requests after every step
    step, last = loop.train_on, world() - 1

    def counted(run: Any, *rest: Any, **options: Any) -> None:
        step(run, *rest, **options)
        if run.done == stop_after and rank() == last:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.train_on = counted
    with pytest.raises(SystemExit) as ended:
        engine.run.main()
    assert not ended.value.code


def arguments_of(drawn: Path, out: Path) -> list[str]:
    data = ["--data.train", str(drawn), "--data.eval", str(drawn), *SMALL, "--optim.epochs", str(EPOCHS)]
    return [*data, "--out", str(out), "--resume", "auto"]


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference between the last checkpoints and metrics of two runs."""
    assert [line.keys() for line in metrics(one)] == [line.keys() for line in metrics(other)]
    pairs = [
        (torch.tensor(a[key], dtype=torch.float64), torch.tensor(b[key], dtype=torch.float64))
        for a, b in zip(metrics(one), metrics(other), strict=True)
        for key in a
    ]
    for file in sorted(path.name for path in last(one).glob("*.safetensors")):
        a, b = load_file(last(one) / file), load_file(last(other) / file)
        assert a.keys() == b.keys()
        pairs += [(a[name].double(), b[name].double()) for name in a]
    return max((a - b).abs().max().item() for a, b in pairs)


def last(out: Path) -> Path:
    newest, broken = storage.newest(out / "checkpoints")
    assert newest is not None
    assert not broken
    return newest


@pytest.fixture(scope="module")
def undisturbed(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function from world size to the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def trained(world: int) -> Path:
        if not (out := folder / str(world)).exists():
            on_ranks(world, train, arguments_of(drawn, out))
        return out

    return trained


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("world", "step"),
    [(2, 5), *(pytest.param(*place, marks=pytest.mark.slow) for place in ((1, 3), (1, 5), (2, 8)))],
    ids=["2 ranks, end of epoch", "1 rank, mid-epoch", "1 rank, end of epoch", "2 ranks, mid-epoch"],
)
def test_stopped_and_resumed_run_equals_the_undisturbed(
    world: int, step: int, undisturbed: Callable[[int], Path], drawn: Path, tmp_path: Path, figure: Figure
) -> None:
    out = tmp_path / "out"
    on_ranks(world, train, arguments_of(drawn, out), step)
    assert storage.step_of(last(out)) == step
    on_ranks(world, train, arguments_of(drawn, out))
    assert storage.step_of(last(out)) == STEPS_PER_EPOCH * EPOCHS
    difference = largest_difference(undisturbed(world), out)
    where = "at its end" if step % STEPS_PER_EPOCH == 0 else "mid-epoch"
    figure(
        "stop and resume in a new process, mid-epoch and at its end, 1 and 2 ranks",
        f"{world} rank{'s' * (world > 1)}, {where}: max difference {difference}",
    )
    assert difference == 0


IN_KNN = ["--save_every", "1000", "--knn.limit", "121"]  # of 11 images: on two ranks 6 and 5 batches for the bank


def evaluated(arguments: list[str], notes: str, stop_in: int = 0) -> None:
    """Train; the last rank receives SIGTERM at the second batch of the kNN of epoch `stop_in`. Notes its batches."""
    counted, read = [0], CenterLoader.__iter__

    def read_on(images: CenterLoader) -> Any:
        for batch in read(images):
            counted[0] += 1
            if counted[0] == 2 and stop_in == -(-counted[-1] // STEPS_PER_EPOCH):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    step = loop.train_on

    def trained(run: Any, *rest: Any, **options: Any) -> None:
        step(run, *rest, **options)
        counted[:] = [0, run.done]

    engine.training.datasets.Knn = lambda *sets, **options: Knn(*sets, **{**options, "batch": 11})  # type: ignore[assignment, misc]
    if world() == 1 or rank():
        online_knn.CenterLoader.__iter__ = read_on  # type: ignore[method-assign]
    loop.train_on = trained
    began = time.monotonic()
    train(arguments)
    Path(f"{notes}{rank()}").write_text(f"{counted[0]} {time.monotonic() - began}")


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("world", "epoch"),
    [(1, 1), *(pytest.param(n, 3, marks=pytest.mark.slow) for n in (2, 1))],
    ids=["1", "2, last", "1, last"],
)
def test_run_that_is_stopped_in_knn_evaluates_when_resumed(
    world: int, epoch: int, drawn: Path, tmp_path: Path, figure: Figure
) -> None:
    undisturbed, out, notes = tmp_path / "undisturbed", tmp_path / "out", str(tmp_path / "notes")
    on_ranks(world, evaluated, [*arguments_of(drawn, undisturbed), *IN_KNN], notes)
    total = int(Path(f"{notes}{world - 1}").read_text().split()[0])
    on_ranks(world, evaluated, [*arguments_of(drawn, out), *IN_KNN], notes, epoch)
    batches = int(Path(f"{notes}{world - 1}").read_text().split()[0])
    assert storage.step_of(last(out)) == epoch * STEPS_PER_EPOCH
    assert len(list((out / "checkpoints").glob("step_*"))) == min(epoch, 2)
    assert sum("knn_top1" in line for line in metrics(out)) == epoch - 1
    assert not (out / "summary.json").exists()
    assert bool(storage.load(last(out))[1]["evaluated_on"]) == (epoch > 1)
    on_ranks(world, evaluated, [*arguments_of(drawn, out), *IN_KNN], notes)
    assert (out / "summary.json").exists()
    difference = largest_difference(undisturbed, out)
    figure(
        "stop and resume in a new process, mid-epoch and at its end, 1 and 2 ranks",
        f"{world} rank{'s' * (world > 1)}, in kNN after {batches} of {total} batches: max difference {difference}",
    )
    assert batches == 2
    assert total > 4
    assert difference == 0


def state_hash(out: Path) -> str:
    """Return a hash of the last checkpoint's tensors and of all metrics."""
    digest = hashlib.sha256(repr(metrics(out)).encode())
    for file in sorted(last(out).glob("*.safetensors")):
        for name, value in sorted(load_file(file).items()):
            digest.update(name.encode() + value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_alone(arguments: list[str], temporary: Path | None) -> None:
    if temporary is not None:
        tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    torch.set_num_threads(1)
    train(arguments)


def seconds_of(arguments: list[str], kill_after: float = float("inf"), temporary: Path | None = None) -> float:
    """Train in a process, killed with all its children after `kill_after` seconds; return the seconds it lived.

    temporary: the folder of its temporary files.
    """
    begun = time.monotonic()
    process = processes.Process((train_alone, (arguments, temporary)), new_session=True)
    try:
        status = process.wait(min(kill_after, 300))
        assert status == 0, process.communicate()[1]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):  # it ended at this moment
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return time.monotonic() - begun


@pytest.mark.reliability
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_run_that_is_killed_at_any_time_equals_the_undisturbed(
    kills: int, drawn: Path, tmp_path: Path, figure: Figure
) -> None:
    saving = ["--save_every", "1", "--keep", "3"]  # something is written at nearly every moment
    length = seconds_of([*arguments_of(drawn, tmp_path / "undisturbed"), *saving])
    expected, equal = state_hash(tmp_path / "undisturbed"), 0
    draw = random.Random(4 + kills)  # a single kill comes at 0.63 of the run
    for number in range(kills):
        out = tmp_path / str(number)
        moment = draw.uniform(0.1, 0.95)
        for _ in range(8):
            lived = seconds_of([*arguments_of(drawn, out), *saving], kill_after=moment * length)
            if not (out / "summary.json").exists():
                break
            length = lived  # it ended before: the machine is faster now than when the undisturbed run was timed
            shutil.rmtree(out)
        assert not (out / "summary.json").exists()
        seconds_of([*arguments_of(drawn, out), *saving])
        equal += state_hash(out) == expected
        assert not list((out / "checkpoints").glob(".*"))
    figure(
        "SIGKILL of the whole tree at 20 random times",
        f"{equal}/{kills}, all interrupted, end with the undisturbed hash",
    )
    assert equal == kills
