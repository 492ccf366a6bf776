"""A stop request ends all ranks after the same step, with a checkpoint, and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from engine.checkpoint import storage
from engine.fault_tolerance import preemption
from tests.conftest import Figure
from tests.engine.test_run import ENVIRONMENT, LAUNCHER, ROOT, RUN, SMALL, metrics

ONE_NODE = ("--config_file", str(ROOT / "engine" / "launch" / "one_node.yaml"), "--num_processes", "2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHES: dict[str, tuple[str, ...]] = {
    "python": (sys.executable,),
    "accelerate": (*LAUNCHER, "--cpu", "--num_processes", "1"),
    "accelerate, 2": (*LAUNCHER, *ONE_NODE),
    "torchrun, 2": TORCHRUN,
}


def start(launch: str, out: Path, drawn: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a long run."""
    command = [*LAUNCHES[launch], str(RUN), "--data.train", str(drawn), *SMALL, "--optim.epochs", "2000"]
    command += ["--save_every", "100000", "--out", str(out), *arguments]
    env = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(out: Path, steps: int, started: subprocess.Popen[str]) -> None:
    """Wait for so many more lines of metrics."""
    path, before = out / "metrics.jsonl", None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and started.poll() is None:
        lines = path.read_text().count("\n") if path.exists() else 0
        before = lines if before is None else before
        if lines >= before + steps:
            return
        time.sleep(0.02)
    raise AssertionError(started.communicate(timeout=5)[0] if started.poll() is not None else "no steps")


def family(started: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]


def ranks(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the ranks: the processes with the script as their first argument."""
    return [
        process for process in processes if process.cmdline()[1:2] == [str(RUN)] or process.cmdline()[2:3] == [str(RUN)]
    ]


def survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that have not ended within ten seconds."""
    return psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("launch", "number", "receiver", "status"),
    [
        pytest.param("python", signal.SIGTERM, "child", {0}, marks=pytest.mark.slow),
        pytest.param("python", signal.SIGUSR1, "child", {75}, marks=pytest.mark.slow),
        pytest.param("python", signal.SIGINT, "child", {0}, marks=pytest.mark.slow),
        pytest.param("accelerate", signal.SIGTERM, "launcher", {-signal.SIGTERM}, marks=pytest.mark.slow),
        ("accelerate, 2", signal.SIGTERM, "launcher", {1, -signal.SIGTERM}),
        pytest.param("accelerate, 2", signal.SIGTERM, "child", {0}, marks=pytest.mark.slow),
        pytest.param("torchrun, 2", signal.SIGUSR1, "launcher", {1}, marks=pytest.mark.slow),
        pytest.param("torchrun, 2", signal.SIGINT, "group", {0, 1, 130}, marks=pytest.mark.slow),
        pytest.param("torchrun, 2", signal.SIGUSR1, "ranks in turn", {1}, marks=pytest.mark.slow),
    ],
)
def test_signal_ends_all_ranks_at_one_step_with_a_checkpoint(
    launch: str,
    number: int,
    receiver: str,
    status: set[int],
    drawn: Path,
    tmp_path: Path,
    figure: Figure,
) -> None:
    started = start(launch, tmp_path, drawn)
    wait_for_steps(tmp_path, 12, started)
    everyone = family(started)
    begin = time.monotonic()
    if receiver == "launcher":
        started.send_signal(number)
    elif receiver == "child":
        ranks(everyone)[-1].send_signal(number)
    elif receiver == "ranks in turn":
        for process in ranks(everyone):
            process.send_signal(number)
            time.sleep(0.3)  # some steps
    else:
        for process in everyone:
            process.send_signal(number)
    text, _ = started.communicate(timeout=60)
    assert not survivors(everyone)
    seconds = time.monotonic() - begin
    figure(
        "SIGTERM to the launcher, to the child; SIGUSR1 at different steps",
        f"{launch}, {signal.Signals(number).name} to the {receiver}: {seconds:.1f} s",
    )
    assert started.returncode in status, text
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    assert storage.newest(tmp_path / "checkpoints") == (saved, [])
    step = storage.step_of(saved)
    assert metrics(tmp_path)[-1]["step"] == step
    assert f"stopped after step {step}, as requested" in text
    assert seconds < 10
    assert "Traceback" not in text.partition("stopped after step")[0]


def test_second_ctrl_c_stops_at_once_unless_a_launcher_forwards_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_FORWARD_SECONDS", 0.3)
    requests = preemption.Requests(torch.device("cpu"))
    before = signal.getsignal(signal.SIGINT)
    with requests.handle_signals():
        assert requests.poll_stop(1) is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        stopped = requests.poll_stop(2)
        assert stopped is not None
        assert stopped.status == 0
        time.sleep(0.4)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGUSR1)
        requeued = requests.poll_stop(3)
        assert requeued is not None
        assert requeued.status == 75
    assert signal.getsignal(signal.SIGINT) == before


def test_stop_works_where_the_reader_of_the_output_is_gone() -> None:
    """The case of Ctrl-C with `2>&1 | tee log`: the terminal sends it to both."""
    requests, streams = preemption.Requests(torch.device("cpu")), [os.dup(stream) for stream in (1, 2)]
    unread, pipe = os.pipe()
    os.close(unread)
    try:
        for stream in (1, 2):
            os.dup2(pipe, stream)
        with requests.handle_signals():
            signal.raise_signal(signal.SIGINT)
            assert requests.poll_stop(1) is not None
        for stream in (1, 2):
            os.write(stream, b"dropped")
    finally:
        for stream, before in zip((1, 2), streams, strict=True):
            os.dup2(before, stream)
            os.close(before)
        os.close(pipe)


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("launch", "number", "limit"),
    [
        pytest.param("torchrun, 2", signal.SIGKILL, 5.0, id="SIGKILL"),
        pytest.param("accelerate, 2", signal.SIGKILL, 5.0, id="SIGKILL, accelerate", marks=pytest.mark.slow),
        pytest.param("accelerate, 2", signal.SIGSTOP, 6.0 + 2.0, id="SIGSTOP", marks=pytest.mark.slow),
    ],
)
def test_lost_rank_is_named_with_its_step(
    launch: str, number: int, limit: float, drawn: Path, tmp_path: Path, figure: Figure
) -> None:
    started = start(launch, tmp_path, drawn, "--collective_timeout", "6")
    wait_for_steps(tmp_path, 12, started)
    everyone = family(started)
    first, last = sorted(ranks(everyone), key=lambda process: int(process.environ()["RANK"]))
    begin = time.monotonic()
    last.send_signal(number)
    assert not psutil.wait_procs([first], timeout=30)[1]
    seconds = time.monotonic() - begin
    if number == signal.SIGSTOP:
        last.kill()
    text, _ = started.communicate(timeout=60)
    result = f"{signal.Signals(number).name}: the other ended {seconds:.1f} s later, both named with their steps"
    figure("SIGKILL of one rank; SIGSTOP of one rank", result)
    assert not survivors(everyone)
    assert re.search(r"rank 0 on \S+, step \d+: rank 1 \(last at step \d+\) did not answer", text), text
    assert seconds < limit, text
    assert re.search(r"in _train_epochs\b.*most recent call first.*rank 0 on \S+, step", text, re.DOTALL), text
