"""The demo on a folder of images, and its refusals."""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from engine import demo
from engine.config.settings import Settings
from engine.parallel import accelerator
from engine.report.plotting import curves
from pipeline.prepare import prepare
from pipeline.sources import synthetic
from pipeline.system.errors import InputError, RunFailed
from tests import ROOT
from tests.engine import small
from tests.engine.test_run import ENVIRONMENT, run

DEMO = (sys.executable, "-m", "engine.demo")


def test_folder_becomes_a_table_a_preview_and_a_curve(tmp_path: Path) -> None:
    for number in range(60):
        pixels, label = synthetic.draw(0, number)
        place = tmp_path / "images" / synthetic.CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:04d}.jpg")
    out = tmp_path / "out"
    path = str(ROOT)
    done = run(str(tmp_path / "images"), "--out", str(out), "--minutes", "0.001", command=DEMO, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    for row in ("raw pixels", "untrained encoder", "trained encoder", "pairs/s", "data-wait", str(out / "curve.png")):
        assert row in done.stdout
    names = ("preview.png", "curve.png", "recipe.yaml", "run/summary.json", "train.beton", "report.html", "demo.json")
    for name in names:
        assert (out / name).is_file()
    assert "--minutes 0.001 is too short for an epoch: one takes --minutes " in done.stderr
    assert "that is little to learn from" in done.stderr
    page = (out / "report.html").read_text()
    assert page.count("before training") == page.count("after training") > 1
    assert "raw pixels" in page


def test_missing_data_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    path = str(ROOT)
    refused = run("nowhere", "--out", str(tmp_path / "out"), command=DEMO, PYTHONPATH=path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: nowhere")
    assert len(refused.stderr.splitlines()) == 1
    assert ENVIRONMENT["OMP_NUM_THREADS"] == "1"


def test_ctrl_c_leaves_training_time_for_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The stand-in for the training takes a second to end after the Ctrl-C, which both receive."""
    (tmp_path / "run.py").write_text(
        "import os, pathlib, signal, time\n"
        "def stop(*_):\n"
        f"    time.sleep(1); pathlib.Path({str(tmp_path / 'saved')!r}).touch(); raise SystemExit\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "for number in (os.getppid(), os.getpid()):\n"
        "    os.kill(number, signal.SIGINT)\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "demo.py"))
    with pytest.raises(KeyboardInterrupt):
        demo._launch(tmp_path / "recipe.yaml", 0)
    assert (tmp_path / "saved").exists()
    assert f"--config {tmp_path / 'recipe.yaml'} --resume auto" in capfd.readouterr().err


@pytest.mark.parametrize(("rate", "message"), [(200.0, "90000 pairs take --minutes 10 here"), (2000.0, "")])
def test_slow_machine_gets_the_minutes_that_it_needs(
    rate: float, message: str, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "measure_rate", lambda settings, seconds: rate)
    monkeypatch.setattr(demo, "_MAX_EPOCHS", 10**6)
    demo._with_epochs(demo._settings(drawn, drawn, Path("out"), cpu=True), demo.Budget(3.5), 0.0)
    log = capsys.readouterr().err
    assert message in log
    assert bool(message) == ("little to learn from" in log)


@pytest.mark.parametrize(("status", "error"), [(0, RunFailed), (1, RunFailed), (2, InputError)])
def test_training_that_ends_early_is_an_error_with_the_remedy(
    status: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With status 0 too, as after a SIGTERM to it alone."""
    (tmp_path / "run.py").write_text(f"raise SystemExit({status})")
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "demo.py"))
    remedy = "resume it with .*--resume auto" if error is RunFailed else "its settings are in .*recipe.yaml"
    with pytest.raises(error, match=remedy):
        demo._launch(tmp_path / "recipe.yaml", 0)


def test_few_images_are_told_rather_than_more_minutes(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "measure_rate", lambda settings, seconds: 1000.0)
    made = demo._with_epochs(demo._settings(drawn, drawn, Path("out"), cpu=True), demo.Budget(10.0), 0.0)
    assert made.optim.epochs == demo._MAX_EPOCHS
    assert "that is little to learn from: give more than 200 images" in capsys.readouterr().err


def test_an_evaluation_that_leaves_no_time_for_an_epoch_is_told(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "measure_rate", lambda settings, seconds: 20.0)
    demo._with_epochs(demo._settings(drawn, drawn, Path("out"), cpu=True), demo.Budget(0.8), 20.0)
    assert "--minutes 0.8 is too short for an epoch: one takes --minutes 1 here" in capsys.readouterr().err


def test_the_advised_minutes_count_the_images_that_they_prepare() -> None:
    """2,500 a minute where the present ones were limited; none more of 100."""
    budget = demo.Budget(0.4)
    assert demo._minutes_for_epoch(budget.images, budget, 1000.0, 20.0) == 1
    assert demo._minutes_for_epoch(budget.images, budget, 45.0, 20.0) == 5
    assert demo._minutes_for_epoch(100, budget, 1.0, 20.0) == 2


def test_rate_of_several_gpus_is_that_of_their_shares(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def rate(settings: Settings, seconds: float) -> float:
        batches.append(settings.data.batch)
        return 100.0

    monkeypatch.setattr(demo, "measure_rate", rate)
    monkeypatch.setattr(demo, "_gpus", lambda cpu: 4)
    monkeypatch.setattr(demo, "_precisions", lambda gpu: ["bf16"])
    made = demo._settings(drawn, drawn, Path("out"))
    assert demo._with_precision(made, 1.0) == 400.0
    assert batches == [made.data.batch // 4]


def test_images_that_knn_cannot_classify_are_trained_on_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixteen classes of one image: no held-out one has its class among the others."""
    for number in range(16):
        (tmp_path / "images" / f"{number:02d}").mkdir(parents=True)
        Image.fromarray(synthetic.draw(0, number)[0]).save(tmp_path / "images" / f"{number:02d}" / "x.png")
    prepare(str(tmp_path / "images"), tmp_path / "x.beton", workers=1, quiet=True)
    made = demo._settings(tmp_path / "x.beton", tmp_path / "x.beton", tmp_path, cpu=True)
    assert demo._baselines(made, demo._untrained(made)) == ({}, 0.0)
    assert made.data.eval == ""
    assert "warning: no kNN: " in capsys.readouterr().err


@pytest.mark.parametrize("rate", [50.0, 1000.0])
@pytest.mark.parametrize("evaluation_seconds", [0.01, 2.0, 30.0])
def test_training_and_its_evaluations_end_within_the_minutes(
    rate: float, evaluation_seconds: float, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, half a minute is kept for start and page."""
    monkeypatch.setattr(demo, "measure_rate", lambda settings, seconds: rate)
    monkeypatch.setattr(demo, "_MAX_EPOCHS", 10**6)
    made = demo._settings(drawn, drawn, Path("out"), cpu=True)
    made = demo._with_epochs(made, demo.Budget(2.0), evaluation_seconds)
    evaluations = math.ceil(made.optim.epochs / made.knn.every)
    seconds = 200 * made.optim.epochs / rate + evaluations * evaluation_seconds
    assert 60 < seconds < 98
    assert 1 <= evaluations <= 10


@pytest.mark.parametrize(("bf16", "chosen"), [(200.0, "bf16"), (50.0, "no"), (None, "no")])
def test_the_faster_precision_of_a_processor_is_chosen(
    bf16: float | None, chosen: str, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16: its pairs a second; None: the processor has no instructions for it."""
    measured = []

    def rate(settings: Settings, seconds: float) -> float:
        measured.append(settings.precision)
        return 100.0 if settings.precision == "no" else bf16 or 1e9

    monkeypatch.setattr(demo, "measure_rate", rate)
    monkeypatch.setattr(demo, "bfloat16_on_cpu", lambda: bf16 is not None)
    made = demo._with_epochs(demo._settings(drawn, drawn, Path("out"), cpu=True), demo.Budget(1.0), 0.0)
    assert made.precision == chosen
    assert measured == (["no"] if bf16 is None else ["no", "bf16"])


def test_subsets_are_found_by_their_folders(tmp_path: Path) -> None:
    for name in ("train/a", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name / "x.png")
    assert demo._subsets(str(tmp_path)) == ["train", "val"]
    assert demo._subsets(str(tmp_path / "train")) == [None]


def test_curves_are_drawn_with_and_without_evaluations(tmp_path: Path) -> None:
    lines = ['{"step": 1, "epoch": 0.5, "loss": 3.0}', '{"step": 2, "epoch": 1, "loss": 2.0}']
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    curves(tmp_path / "m.jsonl", tmp_path / "a.png", levels={})
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, '{"step": 2, "epoch": 1, "knn_top1": 0.5}']))
    curves(tmp_path / "m.jsonl", tmp_path / "b.png", levels={"raw pixels": 0.2})
    sizes = [Image.open(tmp_path / name).size for name in ("a.png", "b.png")]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "20000"])
def test_impossible_training_time_is_refused(minutes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "--minutes", minutes])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2


def test_measuring_a_rate_leaves_no_thread_behind(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a watchdog, which would end the process at some later standstill."""
    before = set(threading.enumerate())
    chosen = small.settings(batch=20)
    chosen.data.train, chosen.data.workers, chosen.cpu = str(drawn), 1, True
    monkeypatch.setattr(demo, "_RATE_STEPS", 2)
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: True)
    assert demo.measure_rate(chosen) > 0
    assert demo.measure_rate(replace(chosen, precision="bf16")) > 0  # Accelerate keeps a process's first precision
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left, left
