"""Two machines, as two network namespaces joined by a cable: training, a cut, and a resumed run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.test_run import ENVIRONMENT, ROOT, RUN, SMALL, metrics

TIMEOUT_SECONDS = 8.0  # of a collective


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Return the names of two namespaces, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 to make network namespaces")
    names = [f"millrace{os.getpid()}{end}" for end in "ab"]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "mra", "netns", names[0], "type", "veth", "peer", "name", "mrb", "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ("mra", "mrb"), strict=True), 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def launch(hosts: list[str], arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Start `accelerate launch` on both."""
    started = []
    for number, (host, end) in enumerate(zip(hosts, ("mra", "mrb"), strict=True)):
        shipped = str(ROOT / "engine" / "launch" / "several_nodes.yaml")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", shipped]
        command += ["--num_processes", "2", "--machine_rank", str(number)]
        command += ["--main_process_ip", "10.77.0.1", "--main_process_port", "29511", str(RUN), *arguments]
        env = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": end}
        log = subprocess.PIPE
        inside = ["ip", "netns", "exec", host, *command]
        started.append(subprocess.Popen(inside, env=env, stdout=log, stderr=subprocess.STDOUT, text=True))
    return started


def ended(started: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    try:
        return [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in started]
    finally:
        for process in started:
            process.kill()


def stop(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        process.terminate()
    ended(started, 60)


def wait_for_step(out: Path, step: int, started: list[Any]) -> None:
    """Wait until the run has logged that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        if (out / "metrics.jsonl").exists() and any(line.get("step", 0) >= step for line in metrics(out)):
            return
        time.sleep(0.05)
    raise AssertionError([process.communicate(timeout=5)[0][-3000:] if process.poll() else "" for process in started])


@pytest.mark.slow
def test_cut_cable_ends_both_ranks_and_the_run_resumes(hosts: list[str], drawn: Path, tmp_path: Path) -> None:
    arguments = ["--data.train", str(drawn), *SMALL, "--save_every", "5", "--collective_timeout", str(TIMEOUT_SECONDS)]
    short = ["--optim.epochs", "3", "--out", str(tmp_path / "short")]
    texts = ended(started := launch(hosts, [*arguments, *short]), 200)
    assert [process.returncode for process in started] == [0, 0], texts
    long = ["--optim.epochs", "2000", "--out", str(tmp_path / "long")]
    started = launch(hosts, [*arguments, *long])
    wait_for_step(tmp_path / "long", 20, started)
    ip("-n", hosts[1], "link", "set", "mrb", "down")
    cut = time.monotonic()
    texts = ended(started, 90)
    seconds = time.monotonic() - cut
    print(f"both ended {seconds:.1f} s after the cut, with a timeout of {TIMEOUT_SECONDS} s")
    assert all(process.returncode for process in started)
    assert seconds < TIMEOUT_SECONDS + 12  # to find the lost rank, and for the launchers to end
    assert "rank 0 on" in texts[0]
    assert re.search(r"rank 1 \(last at step \d+\) did not answer", texts[0])
    assert "rank 1 on" in texts[1]
    ip("-n", hosts[1], "link", "set", "mrb", "up")
    steps = max(int(p.name[5:]) for p in (tmp_path / "long" / "checkpoints").glob("step_*"))
    started = launch(hosts, [*arguments, *long, "--resume", "auto"])
    wait_for_step(tmp_path / "long", steps + 20, started)
    stop(started)
    uncut = ["--optim.epochs", "2000", "--out", str(tmp_path / "uncut")]
    started = launch(hosts, [*arguments, *uncut])
    wait_for_step(tmp_path / "uncut", steps + 20, started)
    stop(started)
    seen, expected = (metrics(tmp_path / name)[: steps + 20] for name in ("long", "uncut"))
    assert [line["step"] for line in seen] == list(range(1, steps + 21))
    assert seen == expected


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the ranks of a launcher."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if str(RUN) in child.cmdline()]


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(drawn: Path, tmp_path: Path) -> None:
    arguments = ["--data.train", str(drawn), *SMALL, "--optim.epochs", "12", "--save_every", "4", "--resume", "auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["--rdzv-conf", "last_call_timeout=1", str(RUN)]
    env = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    losses = []
    for name in ("undisturbed", "killed"):
        out, log = tmp_path / name, subprocess.PIPE
        started = subprocess.Popen(
            [*command, *arguments, "--out", str(out)], env=env, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        if name == "killed":
            wait_for_step(out, 10, [started])
            ranks(started)[1].kill()
        (text,) = ended([started], 200)
        assert started.returncode == 0, text[-3000:]
        assert ("resumed from" in text) == (name == "killed")
        losses.append(metrics(out))
    assert losses[0] == losses[1]
