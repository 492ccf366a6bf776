"""Launch files: Accelerate reads its configurations; the Slurm script calls its tools, which are stand-ins."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.launcher.api import LaunchConfig

from tests import ROOT

LAUNCH = ROOT / "engine" / "launch"


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("one_gpu", 1, 1), ("one_node", 8, 1), ("several_nodes", 16, 2)]
)
def test_accelerate_reads_its_configurations(name: str, processes: int, machines: int) -> None:
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.mixed_precision == "no"
    known = vars(config) | {"compute_environment": None}
    assert set(yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())) <= set(known)


def test_torchrun_waits_nearly_as_long_as_slurm_gives_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable of torchrun is compared to the script's header for Slurm."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    (notice,) = re.findall(r"^#SBATCH --signal B:USR1@(\d+)$", text, re.MULTILINE)
    (seconds,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text, re.MULTILINE)
    assert 60 < int(seconds) < int(notice)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    agent = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    assert getattr(agent, "shutdown_timeout", int(seconds)) == int(seconds)  # older versions of PyTorch lack it


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job, in which each tool writes its arguments to a file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    log = f'printf "%s " "${{0##*/}}" "$@" >>{tmp_path}/calls; echo >>{tmp_path}/calls'
    for name, does in {
        "srun": f'{log}\nwhile [[ $1 == --* ]]; do [[ $1 == *=* ]] && shift || shift 2; done\nexec "$@"',
        "scontrol": f"{log}\n[[ $1 == requeue ]] || printf 'node7\\nnode8\\n'",
        "torchrun": f"{log}\ntrap 'echo torchrun saves >>{tmp_path}/calls; exit 75' USR1\n"
        "[[ -z ${LASTS:-} ]] || { sleep $LASTS & wait $!; }",
        "python": f'{log}\n[[ $2 != engine.launch.slurm_data ]] || exec {sys.executable} $FORKED "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{does}\n")
        (tools / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    forked = {"FORKED": "-m tests.forked"}  # empty: in an interpreter of its own
    return {**os.environ, **job, **forked, "PATH": f"{tools}:{os.environ['PATH']}"}


def calls(tmp_path: Path, tool: str) -> list[str]:
    return [line.strip() for line in (tmp_path / "calls").read_text().splitlines() if line.startswith(f"{tool} ")]


def test_slurm_job_starts_all_nodes_and_resumes(tmp_path: Path, slurm: dict[str, str]) -> None:
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "--config", "R.yaml", "--data.train", "/shared/a b.beton"]
    subprocess.run(script, cwd=tmp_path, env=slurm, check=True)
    assert calls(tmp_path, "torchrun") == [
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node7:20042 --rdzv-id 42 "
        "engine/run.py --resume auto --require-gpu --config R.yaml --data.train /shared/a b.beton"
    ]
    assert "--kill-on-bad-exit=1" in calls(tmp_path, "srun")[0]
    variables = "$SRUN_CPUS_PER_TASK cores, $PET_SIGNALS_TO_HANDLE, $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s"
    (tmp_path / "tools" / "srun").write_text(f'#!/bin/bash\necho "srun {variables}" >>{tmp_path}/calls')
    subprocess.run(script, cwd=tmp_path, env=slurm | {"SLURM_CPUS_PER_TASK": "12"}, check=True)
    assert calls(tmp_path, "srun")[-1] == "srun 12 cores, SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1, 100 s"


@pytest.mark.parametrize(
    ("form", "recipe"),
    [
        (["--data.train", "/shared/t.beton", "--data.eval", "/shared/e.beton"], ""),
        pytest.param(["--data.train=/shared/t.beton", "--data.eval=/shared/e.beton"], "", marks=pytest.mark.slow),
        pytest.param([], "data: {train: /shared/t.beton, eval: /shared/e.beton}", marks=pytest.mark.slow),
        (["--data.eval", "/shared/e.beton"], "data: {train: /shared/t.beton, eval: /shared/other.beton}"),
        pytest.param([], "seed: 2", marks=pytest.mark.slow),
        (["--data.trian", "x"], ""),
    ],
)
def test_slurm_job_stages_its_data_first(form: list[str], recipe: str, tmp_path: Path, slurm: dict[str, str]) -> None:
    (tmp_path / "R.yaml").write_text(recipe or "seed: 1")
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "--config", "R.yaml", *form]
    env = slurm | {"MILLRACE_STAGE": "/local", "PYTHONPATH": str(LAUNCH.parents[1])}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
    if "t.beton" not in f"{form}{recipe}":
        assert done.returncode == 2
        assert ("no --data.train" if recipe else "did you mean data.train") in done.stderr
        assert not calls(tmp_path, "torchrun")
        return
    assert done.returncode == 0, done.stderr
    staged = [f"python -m pipeline.stage /shared/{name}.beton /local/shared" for name in "te"]
    assert calls(tmp_path, "python")[1:] == staged
    assert calls(tmp_path, "torchrun")[0].endswith(
        "--data.train /local/shared/t.beton --data.eval /local/shared/e.beton"
    )


def test_slurm_job_stages_files_of_one_name_apart(tmp_path: Path, slurm: dict[str, str]) -> None:
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "--data.train", "/s/train/x.beton", "--data.eval", "/s/val/x.beton"]
    env = slurm | {"MILLRACE_STAGE": "/local", "FORKED": "", "PYTHONPATH": str(LAUNCH.parents[1])}
    subprocess.run(script, cwd=tmp_path, env=env, check=True)
    staged = "--data.train /local/s/train/x.beton --data.eval /local/s/val/x.beton"
    assert calls(tmp_path, "torchrun")[0].endswith(staged)


def test_preempted_slurm_job_is_requeued(tmp_path: Path, slurm: dict[str, str]) -> None:
    started = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch")], cwd=tmp_path, env=slurm | {"LASTS": "60"}, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and "torchrun" not in (
            (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        ):
            time.sleep(0.05)
        started.send_signal(signal.SIGUSR1)
        started.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    last = [line.strip() for line in (tmp_path / "calls").read_text().splitlines()[-2:]]
    assert last == ["torchrun saves", "scontrol requeue 42"]
