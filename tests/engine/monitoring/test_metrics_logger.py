"""Metrics are summed up exactly, and written even where the disk refuses some."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from engine.monitoring import metrics_logger
from engine.monitoring.collapse import PATIENCE
from engine.monitoring.metrics_logger import MetricsLogger
from engine.monitoring.step_result import Result

SPREAD, COLLAPSED = torch.eye(4), torch.ones(4, 4) / 2


def monitor(out: Path) -> MetricsLogger:
    return MetricsLogger(Accelerator(cpu=True), out, steps=10, epochs=2)


def started(out: Path) -> MetricsLogger:
    out.mkdir(exist_ok=True)
    new = monitor(out)
    new.start(0, 0)
    return new


def add(target: MetricsLogger, *losses: float, waited: float = 0.0) -> None:
    for loss in losses:
        parts = {"loss": torch.tensor(loss + 1), "a": torch.tensor(loss), "b": torch.tensor(1.0)}
        target.add(Result.stack(parts, SPREAD, torch.tensor(math.isfinite(loss))), pairs=8, waited=waited)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_line_has_the_means_since_the_last_one(tmp_path: Path) -> None:
    one = started(tmp_path)
    add(one, 1.0, 2.0)
    one.log(2, 0.4, {"measure": torch.tensor(0.25)}, lr=0.1)
    add(one, 5.0)
    one.log(3, 0.6, {}, lr=0.2)
    first, second = lines(tmp_path)
    assert (first["a"], first["b"], first["loss"], first["lr"]) == (1.5, 1.0, 2.5, 0.1)
    assert (second["step"], second["loss"]) == (3, 6.0)
    assert (first["measure"], "measure" in second) == (0.25, False)


class Operations(TorchDispatchMode):
    """Records the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_adding_a_step_is_one_copy_on_the_device(tmp_path: Path) -> None:
    one, parts = started(tmp_path), {"loss": torch.tensor(2.0), "a": torch.tensor(1.0)}
    result = Result.stack(parts, SPREAD, torch.tensor(True))
    with Operations() as operations:
        one.add(result, pairs=8, waited=0.0, substituted=1)
    assert operations.names == ["aten.clone.default"]
    result.values.fill_(9.0)  # as a replayed step would
    one.log(1, 0.2, {})
    assert (lines(tmp_path)[0]["loss"], lines(tmp_path)[0]["substituted"]) == (2.0, 1.0)


def test_line_that_cannot_be_written_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First the file refuses all, then it takes a line, then part of one."""
    one, path = started(tmp_path), tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    for step in (1, 2):
        add(one, 1.0)
        one.log(step, 0.1 * step, {})
    path.unlink()
    add(one, 3.0)
    one.log(3, 0.3, {})
    warned = [line for line in capsys.readouterr().err.splitlines() if "could not be written" in line]
    assert [line.partition(": training continues")[0] for line in warned] == [
        f"warning: step 1: {path}: could not be written (No space left on device)"
    ]
    written = path.read_text()
    assert [line["step"] for line in lines(tmp_path)] == [3]

    class Short(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_logger, "open", lambda path, mode: io.TextIOWrapper(Short(path, "ab")), raising=False)
    add(one, 4.0)
    with contextlib.suppress(OSError):  # of the wrapper, which tries again when it is collected
        one.log(4, 0.4, {})
    assert path.read_text() == written


def test_evaluation_time_does_not_count(tmp_path: Path) -> None:
    one = started(tmp_path)
    add(one, 1.0, waited=0.01)
    with one.pause():
        time.sleep(0.3)
    one.log(1, 0.1, {})
    assert one.seconds < 0.2
    assert one.pairs == 8
    assert lines(tmp_path)[0]["pairs_per_second"] > 8 / 0.2
    assert lines(tmp_path)[0]["data_wait_fraction"] > 0.05


def test_sums_continue_exactly_after_a_restart(tmp_path: Path) -> None:
    once, before, after = (started(tmp_path / name) for name in ("once", "before", "after"))
    add(once, 0.1, 0.2, 0.3)
    once.log(3, 0.3, {})
    add(before, 0.1, 0.2)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    add(after, 0.3)
    after.log(3, 0.3, {})
    assert lines(tmp_path / "once")[0]["loss"] == lines(tmp_path / "after")[0]["loss"]


def test_later_and_truncated_lines_are_removed_when_resumed(tmp_path: Path) -> None:
    written = [json.dumps({"step": step, "epoch": 0, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(written) + '\n{"step": 2, "ep')
    monitor(tmp_path).start(2, 0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_skipped_steps_are_counted_and_left_out_of_the_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, measures = started(tmp_path), {"measure": torch.tensor(0.25)}
    add(one, 1.0, math.nan, 2.0)
    one.log(3, 0.1, measures)
    add(one, 1.0, math.nan)
    one.log(5, 0.2, measures, lr=0.1)
    add(one, math.inf)
    one.log(6, 0.3, measures, lr=0.1)
    add(one, 4.0)
    one.log(7, 0.4, measures)
    first, second, third, last = lines(tmp_path)
    assert (first["a"], first["b"], first["skipped"], first["measure"]) == (1.5, 1.0, 1, 0.25)
    assert (second["a"], second["skipped"], second["lr"]) == (1.0, 1, 0.1)
    assert "measure" not in second  # of a skipped step
    assert third.keys() & {"loss", "a", "b", "measure"} == set()
    assert third["skipped"] == 1
    assert last["a"] == 4.0
    assert one.skipped == 3
    assert "step 6: 1 steps were skipped" in capsys.readouterr().err
    two = monitor(tmp_path)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.skipped == 3
    assert "skipped" not in last
    assert "taken" not in first


def test_progress_line_of_a_log_file_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = started(tmp_path)
    one.evaluation(0, 0, knn_top1=0.25)
    add(one, 1.0)
    one.log(1, 0.2, {})
    evaluated, shown = capsys.readouterr().err.splitlines()
    assert evaluated == "epoch 0: kNN top-1 25.0%"
    for part in ("step 1/10", "epoch 0.20/2", "loss 2.000", "kNN 25.0%", "pairs/s", "data-wait", "left "):
        assert part in shown


def test_count_of_a_collapse_survives_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = started(tmp_path), monitor(tmp_path)

    def train(target: MetricsLogger, steps: int) -> bool:
        """Train and log; return whether a collapse was warned of."""
        for _ in range(steps):
            target.add(Result.stack({"loss": torch.tensor(1.0)}, COLLAPSED, torch.tensor(True)), pairs=8, waited=0.0)
        target.log(1, 0.1, {})
        return "warning: step 1: COLLAPSE" in capsys.readouterr().err

    assert not train(one, 60)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    two.start(1, 0)
    assert train(two, PATIENCE - 60)
    assert not train(two, 5)  # it was warned of
