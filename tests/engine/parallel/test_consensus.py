"""A problem of one rank ends all ranks, within seconds and with one message; each rank as on a machine of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.parallel.consensus import PeerError, all_gather_object, broadcast_object, run_on_all_ranks
from engine.parallel.rendezvous import rank
from pipeline.prepare import prepare
from pipeline.system.errors import InputError
from tests import processes
from tests.engine.test_run import ENVIRONMENT, RUN, SMALL
from tests.gloo import on_ranks


def launch(*command_lines: list[str]) -> tuple[list[subprocess.CompletedProcess[str]], float]:
    """Run one rank for each command line, as if each had a machine of its own; return results and seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin, world = time.monotonic(), len(command_lines)
    shared = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        processes.Process(
            [sys.executable, str(RUN), *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"},
        )
        for rank, arguments in enumerate(command_lines)
    ]
    results = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        results.append(subprocess.CompletedProcess([], process.wait(), out, err))
    return results, time.monotonic() - begin


def errors(results: list[subprocess.CompletedProcess[str]]) -> list[str]:
    return [line for result in results for line in result.stderr.splitlines() if line.startswith("error")]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"optim.lr": "0.1"}, "optim.lr: rank 0 on {host} has 0.32, rank 1 on {host} 0.1: give all ranks"),
        pytest.param({}, {"data.train": "{other}"}, "data.train: rank 0 on {host} has '", marks=pytest.mark.slow),
        pytest.param(
            {}, {"data.train": "nowhere.beton"}, "rank 1 on {host}: nowhere.beton: no such file", marks=pytest.mark.slow
        ),
        ({"data.train": "nowhere.beton"}, {}, "rank 0 on {host}: nowhere.beton: no such file"),
        pytest.param({}, {"data.bach": "3"}, "rank 1 on {host}: data.bach: no such setting", marks=pytest.mark.slow),
        pytest.param(
            {"data.bach": "3"}, {"data.bach": "3"}, "error: data.bach: no such setting", marks=pytest.mark.slow
        ),
        pytest.param({"data.batch": "41"}, {"data.batch": "41"}, "error: data.batch 41", marks=pytest.mark.slow),
        pytest.param({"out": "{file}"}, {"out": "{file}"}, "choose another folder", marks=pytest.mark.slow),
    ],
)
def test_wrong_launch_ends_all_ranks_with_one_message(
    first: dict[str, str], second: dict[str, str], message: str, drawn: Path, tmp_path: Path
) -> None:
    places = {"other": str(tmp_path / "other.beton"), "file": str(tmp_path / "file"), "host": os.uname().nodename}
    if "other" in str(second):
        prepare("synthetic:60", tmp_path / "other.beton", workers=1, quiet=True)
    (tmp_path / "file").touch()
    lines = []
    for changed in (first, second):
        given = {"data.train": str(drawn), "optim.lr": "0.32", "out": str(tmp_path / "out")} | changed
        lines.append([*SMALL, *(part.format(**places) for key, v in given.items() for part in (f"--{key}", v))])
    results, seconds = launch(*lines)
    assert [result.returncode for result in results] == [2, 2], results
    assert len(errors(results)) == 1, results
    assert message.format(**places) in errors(results)[0]
    assert seconds < 30
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def agree(out: str) -> None:
    assert run_on_all_ranks(rank, must_match=lambda number: {"same": 1}) == rank()
    value = {"rank": 0, "list": [1, 2.5, None]}
    assert broadcast_object(lambda: value | {"rank": rank()}) == value
    assert broadcast_object(lambda: None) is None
    assert all_gather_object(lambda: [rank(), "x"]) == [[0, "x"], [1, "x"], [2, "x"]]
    with pytest.raises(PeerError, match=r"device: rank 0 on .* has 'GPU', rank 2 on .* 'CPU'"):
        run_on_all_ranks(lambda: None, must_match=lambda _: {"device": "CPU" if rank() == 2 else "GPU"})

    def fail(number: int, error: Exception) -> None:
        if rank() == number:
            raise error

    with pytest.raises(PeerError, match=r"rank 1 on .*: wrong"):
        run_on_all_ranks(lambda: fail(1, InputError("wrong")))
    with pytest.raises(PeerError, match=r"rank 0 on .*: no file"):
        broadcast_object(lambda: fail(0, InputError("no file")))
    with pytest.raises(PeerError, match=r"rank 2 on .*: full"):
        all_gather_object(lambda: fail(2, InputError("full")))
    with pytest.raises(ZeroDivisionError if rank() == 1 else PeerError):
        run_on_all_ranks(lambda: fail(1, ZeroDivisionError()))
    Path(out, str(rank())).touch()


def test_all_ranks_raise_the_problem_of_one(tmp_path: Path) -> None:
    on_ranks(3, agree, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_one_rank_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run_on_all_ranks(lambda: 5) == broadcast_object(lambda: 5) == 5
    assert all_gather_object(lambda: 5) == [5]
    with pytest.raises(InputError, match="wrong") as raised:
        run_on_all_ranks(lambda: (_ for _ in ()).throw(InputError("wrong")))
    assert not isinstance(raised.value, PeerError)
