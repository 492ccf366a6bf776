"""What goes wrong on one process ends all of them, within seconds and with one message; as on several machines."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.parallel import rendezvous
from engine.parallel.consensus import Told, from_all, from_first, together
from pipeline.prepare import prepare
from pipeline.system.errors import InputError
from tests.engine.test_run import ENVIRONMENT, RUN, SMALL
from tests.gloo import on_ranks


def machines(*command_lines: list[str]) -> tuple[list[subprocess.CompletedProcess[str]], float]:
    """Run a process of one launch for each command line, as each on a machine of its own; and the seconds it took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun, world = time.monotonic(), len(command_lines)
    shared = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    started = [
        subprocess.Popen(
            [sys.executable, str(RUN), *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(command_lines)
    ]
    ended = []
    for process in started:
        out, err = process.communicate(timeout=120)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended, time.monotonic() - begun


def errors(ended: list[subprocess.CompletedProcess[str]]) -> list[str]:
    return [line for process in ended for line in process.stderr.splitlines() if line.startswith("error")]


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({}, {"optim.lr": "0.1"}, "optim.lr: process 0 on {host} has 0.32, process 1 on {host} 0.1: give all"),
        pytest.param({}, {"data.train": "{other}"}, "data.train: process 0 on {host} has '", marks=pytest.mark.slow),
        pytest.param(
            {},
            {"data.train": "nowhere.beton"},
            "process 1 on {host}: nowhere.beton: no such file",
            marks=pytest.mark.slow,
        ),
        ({"data.train": "nowhere.beton"}, {}, "process 0 on {host}: nowhere.beton: no such file"),
        pytest.param({}, {"data.bach": "3"}, "process 1 on {host}: data.bach: no such setting", marks=pytest.mark.slow),
        pytest.param(
            {"data.bach": "3"}, {"data.bach": "3"}, "error: data.bach: no such setting", marks=pytest.mark.slow
        ),
        pytest.param({"data.batch": "41"}, {"data.batch": "41"}, "error: data.batch 41", marks=pytest.mark.slow),
        pytest.param({"out": "{file}"}, {"out": "{file}"}, "choose another folder", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_launch_ends_all_processes_with_one_message(
    first: dict[str, str], second: dict[str, str], says: str, drawn: Path, tmp_path: Path
) -> None:
    places = {"other": str(tmp_path / "other.beton"), "file": str(tmp_path / "file"), "host": os.uname().nodename}
    if "other" in str(second):
        prepare("synthetic:60", tmp_path / "other.beton", workers=1, quiet=True)
    (tmp_path / "file").touch()
    lines = []
    for changed in (first, second):
        given = {"data.train": str(drawn), "optim.lr": "0.32", "out": str(tmp_path / "out")} | changed
        lines.append([*SMALL, *(part.format(**places) for key, v in given.items() for part in (f"--{key}", v))])
    ended, seconds = machines(*lines)
    assert [process.returncode for process in ended] == [2, 2], ended
    assert len(errors(ended)) == 1, ended
    assert says.format(**places) in errors(ended)[0]
    assert seconds < 60  # most of it to import torch, on both
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def meet(out: str) -> None:
    assert together(lambda: rendezvous.rank(), lambda number: {"same": 1}) == rendezvous.rank()
    assert from_first(lambda: {"rank": rendezvous.rank(), "list": [1, 2.5, None]}) == {
        "rank": 0,
        "list": [1, 2.5, None],
    }
    assert from_first(lambda: None) is None
    assert from_all(lambda: [rendezvous.rank(), "x"]) == [[0, "x"], [1, "x"], [2, "x"]]
    with pytest.raises(Told, match=r"device: process 0 on .* has 'GPU', process 2 on .* 'CPU'"):
        together(lambda: None, lambda _: {"device": "CPU" if rendezvous.rank() == 2 else "GPU"})

    def fail(who: int, error: Exception) -> None:
        if rendezvous.rank() == who:
            raise error

    with pytest.raises(Told, match=r"process 1 on .*: wrong"):
        together(lambda: fail(1, InputError("wrong")))
    with pytest.raises(Told, match=r"process 0 on .*: no file"):
        from_first(lambda: fail(0, InputError("no file")))
    with pytest.raises(Told, match=r"process 2 on .*: full"):
        from_all(lambda: fail(2, InputError("full")))
    with pytest.raises(ZeroDivisionError if rendezvous.rank() == 1 else Told):
        together(lambda: fail(1, ZeroDivisionError()))
    Path(out, str(rendezvous.rank())).touch()


def test_all_are_told_what_happened_on_one(tmp_path: Path) -> None:
    on_ranks(3, meet, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert together(lambda: 5) == from_first(lambda: 5) == 5
    assert from_all(lambda: 5) == [5]
    with pytest.raises(InputError, match="wrong") as raised:
        together(lambda: (_ for _ in ()).throw(InputError("wrong")))
    assert not isinstance(raised.value, Told)
