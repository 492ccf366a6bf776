"""Comparison of runs: groups that differ by their seed alone, settings that differ, and a table of numbers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.checkpoint.compatibility import FREE
from engine.report.run_folder import RunFiles, number

_COMPARED = {"data.train", "data.eval", "data.eval_crop_ratio", "knn.k", "knn.temperature", "knn.limit"}
_FREE = FREE - _COMPARED | {"seed"}
"""Settings in which runs of one group may differ: the compared numbers depend on them by chance only."""
_HIDDEN = {"out", "resume", "allow_change"}
_MAX_CHARACTERS = 120  # characters of a value in the table of settings


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone."""

    number: int
    """Selects its color."""
    runs: list[RunFiles]

    @property
    def label(self) -> str:
        """Names of its runs."""
        names = [run.name for run in self.runs]
        if len(names) == 1:
            return names[0]
        return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} (mean of {len(names)})"

    @property
    def finished(self) -> list[RunFiles]:
        """The runs that were trained to their last epoch."""
        return [run for run in self.runs if run.finished]


def group_by_settings(runs: Sequence[RunFiles]) -> list[Group]:
    """Return the runs in groups of equal settings, except for the seed, in the order given.

    A run with unreadable settings is a group by itself.
    """
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key not in _FREE}
        key = json.dumps(settings, sort_keys=True, default=str) if settings else str(run.path)
        groups.setdefault(key, []).append(run)
    return [Group(index, members) for index, members in enumerate(groups.values())]


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return each setting in which the runs differ, and its value in each of them as text."""
    known = [run for run in runs if run.settings]
    every = dict.fromkeys(key for run in known for key in run.settings)
    sections = {key.rpartition(".")[0] for key in every}  # such as a term: null in one run, with parameters in another
    keys = [key for key in every if key not in _HIDDEN | sections]
    rows = [(key, [_as_text(run, key) for run in runs]) for key in keys]
    return [(key, row) for key, row in rows if len({_as_text(run, key) for run in known}) > 1]


def _as_text(run: RunFiles, key: str) -> str:
    """Return a setting's value as in a recipe, – if the run does not have it."""
    if key not in run.settings:
        return "–"
    value = run.settings[key]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + " ..."


class Cell(NamedTuple):
    """A number as text, a detail in small print, and whether it is the best of its column."""

    text: str
    detail: str = ""
    best: bool = False


class Row(NamedTuple):
    """A row of the table: a run, or the mean over seeds."""

    name: str
    group: int
    cells: list[Cell]
    summary: bool = False


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    value: Callable[[RunFiles], float | str | None]
    """The cell of a run; a number is shown times `factor`."""
    form: str = "{}"
    best: Callable[[Sequence[float]], float] | None = None
    """max or min, if one is better than the other."""
    detail: Callable[[RunFiles], str] = lambda run: ""
    factor: float = 1

    def number(self, run: RunFiles) -> float | None:
        """Return a run's number as shown, None for a text."""
        value = self.value(run)
        return self.factor * value if isinstance(value, (int, float)) else None

    def cell(self, run: RunFiles, best: float | None) -> Cell:
        """Return a run's cell."""
        if (value := self.value(run)) is None:
            return Cell("–")
        text = value if isinstance(value, str) else self.form.format(self.number(run))
        return Cell(text, self.detail(run), self.is_best(text, best))

    def is_best(self, text: str, best: float | None) -> bool:
        """Return whether a number, in the precision of the table, is the best of the column."""
        return best is not None and text == self.form.format(best)


def table(groups: Sequence[Group]) -> tuple[list[str], list[Row]]:
    """Return the titles of the table's columns, and its rows.

    Several seeds are followed by a row with mean and standard deviation (n - 1) of the finished runs. The best of a
    column is chosen among these means and the runs with a single seed.
    """
    columns = _columns([run for group in groups for run in group.runs])
    best = [_best(column, groups) for column in columns]
    rows = []
    for group in groups:
        for run in group.runs:
            marks = best if group.finished == [run] else [None] * len(best)
            cells = [column.cell(run, mark) for column, mark in zip(columns, marks, strict=True)]
            rows.append(Row(run.name, group.number, cells))
        if len(group.finished) > 1:
            cells = [_over_seeds(column, group, mark) for column, mark in zip(columns, best, strict=True)]
            rows.append(Row(f"mean ± deviation, n = {len(group.finished)}", group.number, cells, summary=True))
    return [column.title for column in columns], rows


def _numbers(column: Column, group: Group) -> list[float]:
    """Return the column's numbers of a group's finished runs."""
    return [value for run in group.finished if (value := column.number(run)) is not None]


def _best(column: Column, groups: Sequence[Group]) -> float | None:
    """Return the best of a column, None if there are fewer than two to compare."""
    means = [float(np.mean(values)) for group in groups if (values := _numbers(column, group))]
    return column.best(means) if column.best and len(means) > 1 else None


def _over_seeds(column: Column, group: Group, best: float | None) -> Cell:
    """Return mean and standard deviation over a group's seeds."""
    values = _numbers(column, group)
    if len(values) < 2:
        return Cell("")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    count = f"n = {len(values)}" if len(values) < len(group.finished) else ""
    text = column.form.format(mean)
    return Cell(f"{text} ± {column.form.format(deviation)}", count, column.is_best(text, best))


def _columns(runs: Sequence[RunFiles]) -> list[Column]:
    hours = max((value for run in runs if (value := rates(run).hours)), default=0.0) >= 1
    unit, per_hour = ("hours", 1) if hours else ("minutes", 60)
    same_loss = _same_settings(runs, "method.", "terms.", "data.batch")
    same_knn = _same_settings(runs, "data.train", "data.eval", "knn.k", "knn.temperature", "knn.limit")
    return [
        Column("method", lambda run: _text(run, "method.name")),
        Column("terms", _terms),
        Column("arch", _arch),
        Column("epochs", _epochs),
        Column("batch", lambda run: _text(run, "data.batch")),
        Column("loss", lambda run: run.last("loss"), "{:.3f}", min if same_loss else None),
        Column("kNN top-1, %", lambda run: run.last("knn_top1"), "{:.1f}", max if same_knn else None, _knn_epoch, 100),
        *_evaluation_columns(runs),
        Column("gap", lambda run: run.last("student_teacher_gap"), "{:.4f}"),
        Column("pairs/s", lambda run: rates(run).pairs_per_second, "{:.0f}", max),
        Column("data-wait, %", lambda run: rates(run).data_wait_fraction, "{:.1f}", min, factor=100),
        Column(unit, lambda run: rates(run).hours, "{:.1f}", factor=per_hour),
        Column("device", _device),
    ]


def _text(run: RunFiles, key: str) -> str | None:
    value = run.settings.get(key)
    return None if value is None else str(value)


def _terms(run: RunFiles) -> str | None:
    """Return the terms added to the base's loss."""
    names = [key.split(".")[1] for key, value in run.settings.items() if key.startswith("terms.") and value is not None]
    return ", ".join(dict.fromkeys(names)) or None


def _arch(run: RunFiles) -> str | None:
    arch, width = _text(run, "model.arch"), number(run.settings.get("model.width"))
    return f"{arch}, width {width:g}" if arch and width not in (None, 1) else arch


def _epochs(run: RunFiles) -> str | None:
    if not run.epochs:
        return f"{run.done:g}" if run.lines else None
    return f"{run.epochs:g}" if run.finished else f"{run.done:.2f} of {run.epochs:g}"


def _device(run: RunFiles) -> str | None:
    summary = run.summary
    device, count = summary.get("device"), summary.get("world_size", summary.get("processes"))  # the former key
    if not isinstance(device, str):
        return None
    return f"{count} × {device}" if count not in (1, None) else device


def _same_settings(runs: Sequence[RunFiles], *prefixes: str) -> bool:
    """Return whether runs have the same values of all settings with these prefixes."""
    parts = ({key: value for key, value in run.settings.items() if key.startswith(prefixes)} for run in runs)
    return len({json.dumps(part, sort_keys=True, default=str) for part in parts}) == 1


def _knn_epoch(run: RunFiles) -> str:
    """Return the epoch of the kNN top-1, empty for the last."""
    epoch = next((line["epoch"] for line in reversed(run.lines) if "knn_top1" in line), run.done)
    return f"epoch {epoch:g}" if epoch < run.done else ""


class Rates(NamedTuple):
    """Rates of training alone, over the entire run, including before it was resumed."""

    pairs_per_second: float | None = None
    data_wait_fraction: float | None = None
    hours: float | None = None


def rates(run: RunFiles) -> Rates:
    """Return a run's rates, from its metrics: those in summary.json begin at the last resume."""
    lines, seconds = run.timed()
    if not lines:
        return Rates(number(run.summary.get("pairs_per_second")), number(run.summary.get("data_wait_fraction")))
    waited = seconds * np.array([line.get("data_wait_fraction", 0.0) for line in lines])
    total = float(seconds.sum())
    return Rates(run.settings["data.batch"] * lines[-1]["step"] / total, float(waited.sum()) / total, total / 3600)


# Evaluations


class _Kind(NamedTuple):
    """Kind of evaluation: scores of one kind are comparable."""

    title: str
    settings: str
    """Settings as JSON, without encoder, its normalization, seed, and values found by a sweep."""


def _kind(result: dict[str, Any]) -> _Kind:
    ignored = {"encoder", "mean", "std", "seed", *(("lr", "weight_decay") if "sweep" in result else ())}
    saved = result.get("settings")
    settings = {key: value for key, value in saved.items() if key not in ignored} if isinstance(saved, dict) else {}
    for name in ("train", "test"):
        settings[name] = f"{Path(str(result.get(name))).name} ({settings.get(name)})"
    measure = "mAP" if "map" in result else "top-1"
    which = ", momentum encoder" if result.get("which") == "momentum" else ""
    return _Kind(f"{result['evaluation']}{which}: {measure}, %", json.dumps(settings, sort_keys=True, default=str))


def _evaluation_columns(runs: Sequence[RunFiles]) -> list[Column]:
    """Return a column for each kind of evaluation. Titles that would be equal also state the settings that differ."""
    kinds = sorted({_kind(result) for run in runs for result in run.evaluations})
    columns = []
    for kind in kinds:
        namesakes = [json.loads(other.settings) for other in kinds if other.title == kind.title]
        settings = json.loads(kind.settings)
        distinct = [f"{k} {v}" for k, v in settings.items() if any(other.get(k) != v for other in namesakes)]
        title, value, detail = ", ".join([kind.title, *distinct]), partial(_score, kind), partial(_score_detail, kind)
        columns.append(Column(title, value, "{:.1f}", max, detail, 100))
    return columns


def _result(run: RunFiles, kind: _Kind) -> dict[str, Any]:
    """Return the run's result of that kind, empty if there is none."""
    return next((result for result in run.evaluations if _kind(result) == kind), {})


def _score(kind: _Kind, run: RunFiles) -> float | None:
    result = _result(run, kind)
    return number(result.get("map", result.get("top1")))


def _score_detail(kind: _Kind, run: RunFiles) -> str:
    """Return the 95 % interval, and the checkpoint's step if the run continued after it, as text."""
    result = _result(run, kind)
    interval = result.get("interval")
    bounds = [number(bound) for bound in interval] if isinstance(interval, list) else []
    parts = ["–".join(f"{100 * bound:.1f}" for bound in bounds if bound is not None)] if len(bounds) == 2 else []
    step = Path(str(result.get("checkpoint"))).name.removeprefix("step_")
    if step.isdecimal() and run.lines and int(step) != run.lines[-1]["step"]:
        parts.append(f"of step {int(step)}")
    return ", ".join(parts)
