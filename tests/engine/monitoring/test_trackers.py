"""Trackers: read back after a kill and a resume, with settings and labels; failures that cost no training."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from engine.config.settings import Settings, Tracking
from engine.monitoring import trackers as module
from engine.monitoring.trackers import Trackers
from engine.report import curves
from engine.training import loop
from engine.training.build import Run
from tests import ROOT
from tests.engine.test_run import SMALL, main, metrics, run

Points = dict[str, list[tuple[int, float]]]
"""Step and value of each metric, in the order in which the tracker has them."""
EXPECTED: Points = {
    "loss": [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)],
    "knn_top1": [(3, 0.3), (6, 0.6)],
}


def chosen(names: str, out: Path, *, resume: str = "") -> Settings:
    labels = Tracking(project="demo", name="first", group="seeds", tags=["small", "cpu"])
    return Settings(tracker=names, tracking=labels, out=str(out), resume=resume, log_every=7)


def live(names: str, out: str, step: int, steps: int, later: list[Any], kill: bool) -> None:
    """Log steps of a run, and evaluations at 3 and 6; then be killed, or finish."""
    Accelerator(cpu=True)
    Path(out).mkdir(exist_ok=True)
    one = Trackers(chosen(names, Path(out), resume="auto" if step else ""), Path(out))
    one.start(step, {tuple(line) for line in later})
    for now in range(step + 1, steps + 1):
        one.write({"step": now, "epoch": now / 3, "loss": now + 0.5}, evaluation=False)
        if now % 3 == 0:
            one.write({"step": now, "epoch": now / 3, "knn_top1": now / 10}, evaluation=True)
    if kill:
        time.sleep(2 * (names in ("trackio", "wandb")))  # they send or flush after a while
        os._exit(0)
    one.finish()


def killed_and_resumed(names: str, out: Path, **environment: str) -> None:
    """Log six steps, be killed, and resume from a checkpoint of step 4, the last evaluation being that of step 3."""
    for arguments in ((0, 6, [], True), (4, 7, [[5, False], [6, False], [6, True]], False)):
        code = f"from tests.engine.monitoring.test_trackers import live\nlive{(names, str(out), *arguments)!r}"
        done = run("-c", code, command=(sys.executable,), real=True, PYTHONPATH=search_path(), **environment)
        assert done.returncode == 0, done.stderr


def search_path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def events(out: Path) -> Any:
    """Return TensorBoard's reader of a run's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "millrace"), size_guidance={"scalars": 0, "images": 0})
    return reader.Reload()


def scalars(out: Path) -> Points:
    reader = events(out)
    return {
        tag: [(point.step, round(point.value, 4)) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]
    }


def test_tensorboard_has_one_value_a_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Accelerator(cpu=True)
    for step, steps, later in ((0, 6, []), (4, 7, [(5, False), (6, False), (6, True)])):
        one = Trackers(chosen("tensorboard", out, resume="auto" if step else ""), out)
        one.start(step, later)
        for now in range(step + 1, steps + 1):
            one.write({"step": now, "loss": now + 0.5}, evaluation=False)
            if now % 3 == 0:
                one.write({"step": now, "knn_top1": now / 10}, evaluation=True)
    one.finish()
    assert scalars(out) == EXPECTED
    [plugin] = events(out).PluginTagToContent("hparams").keys() - {"_hparams_/experiment", "_hparams_/session_end_info"}
    stored = events(out).PluginTagToContent("hparams")[plugin]
    assert b"optim.lr" in stored
    assert not (out / "trackers.json").exists()


def test_evaluation_that_is_repeated_is_not_logged_again(tmp_path: Path) -> None:
    """The run was killed after the evaluation of step 3, before the checkpoint that would have recorded it."""
    Accelerator(cpu=True)
    for later in ((), {(3, True)}):
        one = Trackers(chosen("tensorboard", tmp_path, resume="auto"), tmp_path)
        one.start(3, later)
        one.write({"step": 3, "knn_top1": 0.25}, evaluation=True)
        one.finish()
    assert scalars(tmp_path) == {"knn_top1": [(3, 0.25)]}


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format, after a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:  # the rest of a block
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete, or its last part
            yield record
            record = b""


def test_wandb_offline_has_one_value_a_step(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    place = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    killed_and_resumed("wandb", tmp_path / "out", **place, WANDB__TRANSACTION_LOG_FLUSH_INTERVAL="0.5")
    from wandb.proto import wandb_internal_pb2

    points: Points = {}
    starts = []
    for path in sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                starts.append(record.run)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key in EXPECTED.keys() & items.keys():
                points.setdefault(key, []).append((int(items["_step"]), items[key]))
    assert points == EXPECTED
    assert {start.run_id for start in starts} == {ids(tmp_path)["wandb"]}
    assert (starts[0].project, starts[0].display_name, starts[0].run_group) == ("demo", "first", "seeds")
    assert list(starts[0].tags) == ["small", "cpu"]
    assert "log_every" in {update.key for update in starts[0].config.update}


def ids(tmp_path: Path) -> dict[str, str]:
    return json.loads((tmp_path / "out" / "trackers.json").read_text())


def test_mlflow_store_has_one_value_a_step(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    store = f"file://{tmp_path}/mlruns"
    killed_and_resumed("mlflow", tmp_path / "out", MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true")
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = tracking.MlflowClient(store)
    run_id = ids(tmp_path)["mlflow"]
    points = {key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)] for key in EXPECTED}
    assert points == EXPECTED
    [experiment] = [one for one in client.search_experiments() if one.name == "demo"]
    [one] = client.search_runs([experiment.experiment_id])
    assert (one.info.run_id, one.info.run_name, one.info.status) == (run_id, "first", "FINISHED")
    assert one.data.params["log_every"] == "7"
    assert {key: one.data.tags[key] for key in ("group", "small", "cpu")} == {
        "group": "seeds",
        "small": "true",
        "cpu": "true",
    }


def test_trackio_has_one_value_a_step(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    place = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    killed_and_resumed("trackio", tmp_path / "out", **place)
    code = (
        "import json, sys\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps([SQLiteStorage.get_runs('demo'), SQLiteStorage.get_logs('demo', 'first')]))"
    )
    done = run("-c", code, command=(sys.executable,), real=True, PYTHONPATH=search_path(), **place)
    names, rows = json.loads(done.stdout.splitlines()[-1])
    points = {key: [(row["step"], row[key]) for row in rows if key in row] for key in EXPECTED}
    assert points == EXPECTED
    assert names == ["first"]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "comet_ml"])
def test_missing_package_is_one_line_before_anything_is_written(
    name: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "get_available_trackers", lambda: ["tensorboard"])
    given = ["--data.train", str(drawn), *SMALL, "--tracker", "tensorboard", name, "--out", str(tmp_path / "out")]
    assert main(monkeypatch, *given) == 2
    package = name.replace("_", "-")
    assert capsys.readouterr().err == (
        f"error: tracker '{name}': the package {package} is not installed: pip install {package}, "
        "or choose another, such as tensorboard\n"
    )
    assert not (tmp_path / "out").exists()


class Fake(GeneralTracker):
    """A tracker whose server can be away."""

    name = "fake"
    requires_logging_directory = False
    away: tuple[str, ...] = ()
    seen: list[tuple[str, Any]]

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    @property
    def tracker(self) -> Any:
        return self

    def _note(self, call: str, value: Any) -> None:
        if call in self.away:
            raise ConnectionError(f"no server\nfor {call}")
        self.seen.append((call, value))

    def start(self) -> None:
        self._note("start", self.arguments)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._note("log", step)

    def finish(self, exit_code: int = 0) -> None:
        self._note("finish", exit_code)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """A tracker in the place of W&B's."""

    class New(Fake):
        pass

    New.seen = []
    monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "wandb", New)
    monkeypatch.setattr(module, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    return New


def trained(drawn: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    given = ["--data.train", str(drawn), *SMALL, "--optim.epochs", "1", "--tracker", "wandb,tensorboard"]
    return main(monkeypatch, *given, "--out", str(out), *more)


@pytest.mark.parametrize(
    ("away", "message"),
    [
        (
            "start",
            "tracker wandb: did not start (no server for start): training continues without it",
        ),
        (
            "log",
            "step 1: tracker wandb: could not be written (no server for log): training continues",
        ),
        ("finish", "step 5: tracker wandb: could not be written (no server for finish)"),
    ],
)
def test_tracker_whose_server_is_away_is_one_warning(
    away: str,
    message: str,
    fake: type[Fake],
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.away = (away,)
    assert trained(drawn, tmp_path / "out", monkeypatch) == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "tracker wandb" in line]
    assert warning.startswith(f"warning: {message}")
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in scalars(tmp_path / "out")["loss"]] == [1, 2, 3, 4, 5]
    assert ("log", 1) in fake.seen or away != "finish"


def test_failed_call_is_followed_by_a_rest(fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt takes 3 s: the next one comes after 30 s."""
    Accelerator(cpu=True)
    now, tried = 100.0, []

    def log(self: Fake, values: Any, step: int) -> None:
        nonlocal now
        tried.append(step)
        now += 3
        if step < 5:
            raise ConnectionError("no server")

    monkeypatch.setattr(fake, "log", log)
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    one = Trackers(chosen("wandb", tmp_path), tmp_path)
    one.start(0)
    for step in range(1, 8):
        one.write({"step": step, "loss": 1.0}, evaluation=False)
        now += 12
    assert tried == [1, 4, 7]
    one.finish()


def test_ids_are_kept_for_a_resumed_run_alone(fake: type[Fake], tmp_path: Path) -> None:
    arguments = []
    for resume in ("", "auto", ""):
        one = Trackers(chosen("wandb", tmp_path, resume=resume), tmp_path)
        one.start(0)
        one.finish()
        arguments.append(fake.seen[-2][1])
    first, second, third = (given["id"] for given in arguments)
    assert first == second != third
    assert arguments[0]["resume"] == "allow"
    assert arguments[0]["name"] == "first"
    assert arguments[0]["config"] | {"optim.lr": 0.03, "model.dim": 128, "data.sizes": "[]"} == arguments[0]["config"]
    assert {type(value) for value in arguments[0]["config"].values()} <= {str, int, float, bool}


def test_failed_run_ends_as_failed(
    fake: type[Fake], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FloatingPointError("diverged")

    monkeypatch.setattr(loop, "train_on", fail)
    assert trained(drawn, tmp_path / "out", monkeypatch) == 1
    assert [value for call, value in fake.seen if call == "finish"] == [1]


def test_resumed_training_continues_its_curves(
    fake: type[Fake], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended at step 4, two steps after its checkpoint. W&B, which may lack the last step, receives it again."""
    train_on = loop.train_on

    def fail(run: Run, *arguments: Any, **more: Any) -> None:
        if run.done == 4:
            raise FloatingPointError("diverged")
        train_on(run, *arguments, **more)

    monkeypatch.setattr(loop, "train_on", fail)
    assert trained(drawn, tmp_path / "out", monkeypatch, "--save_every", "2", "--keep", "0") == 1
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step_00000004")
    monkeypatch.setattr(loop, "train_on", train_on)
    assert trained(drawn, tmp_path / "out", monkeypatch, "--save_every", "2", "--resume", "auto") == 0
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in scalars(tmp_path / "out")["loss"]] == [1, 2, 3, 4, 5]
    assert [value for call, value in fake.seen if call == "log"] == [1, 2, 3, 4, 4, 5]
    first, second = (value for call, value in fake.seen if call == "start")
    assert first["id"] == second["id"]


def test_damaged_ids_are_one_line(
    fake: type[Fake], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trackers.json").write_text("[")
    assert trained(drawn, tmp_path, monkeypatch, "--resume", "auto") == 2
    assert "trackers.json: " in (err := capsys.readouterr().err)
    assert "remove it: the trackers then start new curves" in err


def test_pictures_of_views_and_curves_are_logged_when_asked(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (120, 80), "red").save(buffer, "png")
    drawn_from: list[list[Path]] = []
    monkeypatch.setattr(curves, "draw_all", lambda paths: drawn_from.append(paths) or buffer.getvalue())
    given = ["--data.train", str(drawn), *SMALL, "--optim.epochs", "1", "--tracker", "tensorboard"]
    assert main(monkeypatch, *given, "--out", str(tmp_path / "out"), "--tracking.images") == 0
    assert drawn_from == [[tmp_path / "out"]]
    reader = events(tmp_path / "out")
    assert {tag: [image.step for image in reader.Images(tag)] for tag in reader.Tags()["images"]} == {
        "views": [0],
        "curves": [5],
    }
    assert all(image.width > 100 for image in reader.Images("views"))


def test_image_reaches_a_tracker_as_pixels(tmp_path: Path) -> None:
    Accelerator(cpu=True)
    one = Trackers(chosen("tensorboard", tmp_path), tmp_path)
    one.start(0)
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., 0] = 255
    one.image(2, "red", pixels)
    one.finish()
    [image] = events(tmp_path).Images("red")
    assert (image.step, image.width, image.height) == (2, 6, 4)
