"""Complete runs like a user's: images to encoder, killed and resumed, on two ranks, with bad input."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import engine.run
from engine.parallel.rendezvous import rank
from engine.training import loop
from engine.training.build import Run, agree_on_launch
from engine.training.resume import modules
from pipeline.sources import synthetic
from tests import ROOT, processes
from tests.conftest import made_once
from tests.gloo import on_ranks

RUN = ROOT / "engine" / "run.py"
LAUNCHER = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
SMALL = [
    *("--data.augmentation", "moco_v2_32", "--data.size", "16", "--data.batch", "40", "--data.eval_crop_ratio", "1"),
    *("--data.workers", "1", "--model.arch", "resnet18", "--model.stem", "small", "--model.width", "0.125"),
    *("--model.dim", "16", "--method.queue_size", "70", "--method.ema_momentum", "0.9", "--optim.lr", "0.32"),
    *(
        "--optim.lr_rule",
        "linear",
        "--optim.schedule_interval",
        "step",
        "--log_every",
        "1",
        "--tracker",
        "none",
        "--knn.k",
        "5",
        "--cpu",
        "true",
    ),
]


WALL_CLOCK = ("pairs_per_second", "data_wait_fraction")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(
    *arguments: str, command: tuple[str, ...] = (sys.executable, str(RUN)), real: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a forked process or, if `real`, in an interpreter of its own."""
    command, environment = (*command, *arguments), {**ENVIRONMENT, **env}
    if real:
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return processes.run(command, environment)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the metrics lines without measurements of time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def test_from_image_files_to_knn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(120):
        pixels, label = synthetic.draw(0, number)
        place = tmp_path / "images" / ("train" if number < 100 else "test") / synthetic.CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:04d}.jpg")
    for subset in ("train", "test"):
        arguments = [str(tmp_path / "images"), str(tmp_path / f"{subset}.beton"), "--subset", subset]
        made = run(*arguments, command=(sys.executable, "-m", "pipeline.prepare"), PYTHONPATH=str(ROOT))
        assert made.returncode == 0, made.stderr
    out = tmp_path / "out"
    betons = ["--data.train", str(tmp_path / "train.beton"), "--data.eval", str(tmp_path / "test.beton")]
    done = run(*betons, *SMALL, "--optim.epochs", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    rates = [0.32 * 40 / 256 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [line["lr"] for line in lines if "loss" in line] == pytest.approx(rates)
    assert [line["epoch"] for line in lines if "knn_top1" in line] == [1, 2]
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["knn_top1"] <= 1
    assert (out / "checkpoints" / "latest").read_text() == "step_00000004"
    assert main(monkeypatch, "--config", str(out / "config.yaml"), "--out", str(tmp_path / "again")) == 0
    assert metrics(tmp_path / "again") == lines


@pytest.mark.slow
def test_run_killed_in_mid_epoch_and_resumed_equals_the_undisturbed(drawn: Path, tmp_path: Path) -> None:
    arguments = ["--data.train", str(drawn), "--data.eval", str(drawn), *SMALL, "--optim.epochs", "3"]
    arguments += ["--save_every", "2", "--log_every", "3"]
    undisturbed = run(*arguments, "--out", str(tmp_path / "undisturbed"), real=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    out = tmp_path / "killed"
    command = [sys.executable, str(RUN), *arguments, "--out", str(out)]
    process = processes.Process(command, ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "step_00000006").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = json.loads(
        (out / "checkpoints" / (out / "checkpoints" / "latest").read_text() / "state.json").read_text()
    )
    assert reached["step"] < 15, "the run was over before it was killed"
    assert not (out / "summary.json").exists()
    resumed = run(*arguments, "--out", str(out), "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert metrics(out) == metrics(tmp_path / "undisturbed")
    for name in ("model", "optimizer"):
        ends = [
            load_file(p / "checkpoints" / "step_00000015" / f"{name}.safetensors")
            for p in (tmp_path / "undisturbed", out)
        ]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.slow
def test_diverged_run_fails_and_resumes_from_a_good_checkpoint(drawn: Path, tmp_path: Path) -> None:
    """The rate diverges after the fourth step; the saved state is from before, and resumes at a lower rate."""
    out = tmp_path / "out"
    arguments = ["--data.train", str(drawn), *SMALL, "--save_every", "2", "--precision", "no", "--out", str(out)]
    good = run(*arguments, "--optim.epochs", "1", "--optim.schedule", "constant", "--save_every", "4")
    assert good.returncode == 0, good.stderr
    wild = ["--optim.lr", "1e12", "--optim.epochs", "3", "--resume", "auto", "--allow-change", "optim"]
    diverged = run(*arguments, *wild)
    assert diverged.returncode == 1, diverged.stderr
    assert "loss or gradients have not been finite for" in diverged.stderr
    assert "steps were skipped" in diverged.stderr
    saved = sorted(path.name for path in (out / "checkpoints").glob("step_*"))
    assert saved[-1] <= "step_00000008"  # one more may be saved before three in a row were skipped
    assert f"resume from {out / 'checkpoints' / saved[-1]}, the last good one" in diverged.stderr
    lower = ["--optim.epochs", "2", "--resume", str(out / "checkpoints" / saved[-1])]
    refused = run(*arguments, *lower)
    assert refused.returncode == 2
    assert refused.stderr.endswith("or add --allow-change optim.lr --allow-change optim.epochs\n")
    resumed = run(*arguments, *lower, "--allow-change", "optim")
    assert "resumed from" in resumed.stderr
    assert "for 20 steps" not in resumed.stderr


def train_and_dump(arguments: list[str], folder: str) -> None:
    """Train like engine/run.py; write this rank's modules into the folder."""
    runs: list[Run] = []
    build = loop.build

    def built(*arguments: Any) -> Run:
        runs.append(build(*arguments))
        return runs[-1]

    loop.build, sys.argv = built, ["run.py", *arguments]
    loop.train(*agree_on_launch())
    state = {key: value.contiguous() for key, value in modules(runs[0]).state_dict().items()}
    save_file(state, Path(folder) / f"rank{rank()}.safetensors")


@pytest.fixture(scope="module")
def two_ranks(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two CPU ranks."""

    def make(folder: Path) -> None:
        data = ["--data.train", str(drawn), "--data.eval", str(drawn)]
        arguments = [*data, *SMALL, "--optim.epochs", "2", "--precision", "no", "--out", str(folder / "out")]
        on_ranks(2, train_and_dump, arguments, str(folder))

    return made_once(tmp_path_factory, "two_ranks", make) / "out"


def test_two_ranks_write_one_run_folder(two_ranks: Path) -> None:
    lines = metrics(two_ranks)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert json.loads((two_ranks / "summary.json").read_text())["world_size"] == 2
    assert sorted(p.name for p in (two_ranks / "checkpoints").glob("step_*")) == ["step_00000005", "step_00000010"]


def test_two_ranks_have_the_same_queue_and_parameters(two_ranks: Path) -> None:
    first, second = (load_file(two_ranks.parent / f"rank{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(first["queue.keys"], second["queue.keys"])
    parameters = [key for key in first if "running" not in key and "num_batches" not in key]
    assert parameters
    assert all(torch.equal(first[key], second[key]) for key in parameters)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run engine/run.py in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        engine.run.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "already holds a run: add --resume auto"),
        (["--resume", "auto", "--method.queue_size", "50"], "method.queue_size 50: the checkpoint has 70"),
        (["--resume", "auto", "--model.width", "0.25"], "model.width 0.25: the checkpoint has 0.125"),
        (["--resume", "auto", "--seed", "1"], "seed 1: the checkpoint has 0"),
        (["--resume", "{first}"], "contains step_00000010, which is later than"),
    ],
)
def test_existing_run_is_neither_overwritten_nor_mixed_with_another(
    two_ranks: Path,
    drawn: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.read_bytes() for path in two_ranks.rglob("*") if path.is_file()}
    given = [a.format(first=two_ranks / "checkpoints" / "step_00000005") for a in arguments]
    options = ["--data.train", str(drawn), "--data.eval", str(drawn), *SMALL, "--optim.epochs", "2"]
    assert main(monkeypatch, *options, "--precision", "no", "--out", str(two_ranks), *given) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in two_ranks.rglob("*") if path.is_file()} == before


def test_resuming_a_finished_run_changes_nothing(two_ranks: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [(two_ranks / name).read_text() for name in ("summary.json", "config.yaml")]
    options = ["--data.train", str(drawn), "--data.eval", str(drawn), *SMALL, "--optim.epochs", "2"]
    assert main(monkeypatch, *options, "--precision", "no", "--out", str(two_ranks), "--resume", "auto") == 0
    assert [(two_ranks / name).read_text() for name in ("summary.json", "config.yaml")] == before


def test_finished_run_without_a_summary_gets_one(
    two_ranks: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case of a kill between the last checkpoint and the summary."""
    shutil.copytree(two_ranks, tmp_path / "run")
    original = json.loads((two_ranks / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").unlink()
    options = ["--data.train", str(drawn), "--data.eval", str(drawn), *SMALL, "--optim.epochs", "2"]
    assert main(monkeypatch, *options, "--precision", "no", "--out", str(tmp_path / "run"), "--resume", "auto") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(summary[key] == original[key] for key in ("step", "loss", "knn_top1"))


def test_second_run_into_the_same_folder_is_refused(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(monkeypatch, "--data.train", str(drawn), *SMALL, "--out", str(out)) == 2
    assert "another run is writing into it" in capsys.readouterr().err
    assert not (out / "config.yaml").exists()


def test_full_gpu_memory_is_one_line_with_the_remedy(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")

    monkeypatch.setattr(loop, "train_on", full)
    assert main(monkeypatch, "--data.train", str(drawn), *SMALL, "--out", str(tmp_path / "out")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "error: step 0, memory of the GPU is full (CUDA out of memory): compute less at once (--micro-b"
    )


def test_out_that_is_a_file_is_refused(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(monkeypatch, "--data.train", str(drawn), *SMALL, "--out", str(tmp_path / "file")) == 2
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train", "nowhere.beton"], "nowhere.beton: no such file"),
        ([], "data.train is not set"),
        (["--data.train", "{truncated}"], "not an intact beton"),
        (["--data.bach", "3"], "did you mean data.batch"),
        (["--data.batch", "many"], "wrong type"),
        (["--data.train", "{drawn}", "--data.batch", "400"], "a batch of 400 from 200 samples"),
        (["--data.train", "{drawn}", "--method.queue_size", "0"], "method.queue_size 0"),
        (["--data.train", "{drawn}", "--precision", "fp16"], "fp16"),
        (["--data.train", "{drawn}", "--resume", "{empty}"], "not a checkpoint"),
        (["--data.train", "{drawn}", "--gradient_accumulation_steps", "30"], "gradient_accumulation_steps 30"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    drawn: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cut.beton").write_bytes(drawn.read_bytes()[:5000])
    places = {"drawn": drawn, "truncated": tmp_path / "cut.beton", "empty": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["run.py", *SMALL, "--out", str(tmp_path / "out"), *given])
    with pytest.raises(SystemExit) as ended:
        engine.run.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert ended.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_bad_input_of_a_command_is_one_line_and_exit_status_2() -> None:
    refused = run("--data.train", "nowhere.beton", real=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: nowhere.beton: no such file")
    assert len(refused.stderr.splitlines()) == 1


def test_queue_larger_than_the_data_set_is_a_warning(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.train", str(drawn), "--optim.epochs", "1", "--out", str(tmp_path / "out")]
    assert main(monkeypatch, *SMALL, *options, "--method.queue_size", "300") == 0
    assert "warning: method.queue_size 300 is larger than the data set's 200 images" in capsys.readouterr().err
