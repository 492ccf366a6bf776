"""Charts of metrics over epochs: selection and drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.report.compare import Group, group_by_settings
from engine.report.plotting import LIGHT, Theme, draw_lines, mean_of, sheet, style_of
from engine.report.run_folder import Curve, RunFiles, curve, read_runs

_MAX_POINTS = 250
_MAX_PATH_POINTS = 16  # few: measures of single steps are noisy
_MAX_CHARTS = 40


@dataclass(frozen=True)
class Chart:
    """A metric over epochs, or over another metric, `against`."""

    key: str
    title: str
    caption: str = ""
    factor: float = 1.0
    marked: bool = False
    summed: bool = False
    """Whether to draw the sum since the start, for counts."""
    against: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)
    """Values to compare with, by name: dashed lines."""


_LOSS = Chart("loss", "loss", "All terms with their weights. Losses of different methods do not compare.")
_KNOWN = (
    Chart("knn_top1", "kNN top-1, %", "Nearest neighbors in the backbone's features, during training.", 100, True),
    Chart("probe_top1", "probe top-1, %", "Linear classifier that trains along, on held-out images.", 100, True),
    Chart("probe_train_top1", "probe top-1 in training, %", "On the augmented views that it trains on.", 100),
    Chart(
        "student_teacher_gap",
        "student-teacher gap",
        "1 − cosine of both networks' embeddings of one view: 0 where they agree.",
    ),
    Chart(
        "alignment",
        "alignment over uniformity",
        "From the ring to the dot. Down: positive pairs are closer; left: embeddings are spread more evenly.",
        against="uniformity",
    ),
    Chart("embedding_std", "deviation of the embeddings × √C", "About 1 on the full sphere, 0 after collapse."),
    Chart("effective_rank", "effective rank of the embeddings", "Dimensions in use: at most C, and the batch."),
    Chart("positive_similarity", "similarity of positive pairs", "Cosine of a query and its own key."),
    Chart("negative_similarity", "similarity of negative pairs", "Mean cosine of a query and the negatives."),
    Chart("lr", "learning rate"),
    Chart("momentum", "momentum", "Of the momentum encoder."),
    Chart("pairs_per_second", "pairs/s", "Of all ranks, training only."),
    Chart("data_wait_fraction", "data-wait, %", "Fraction of the time spent waiting for data.", 100),
    Chart("skipped", "skipped steps", "Since the start, for a non-finite loss or gradient.", summed=True),
    Chart("substituted", "substituted samples", "Read instead of damaged ones, since the start.", summed=True),
)
_NO_CHART = {"step", "epoch", "uniformity"}


def select_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the charts for which these runs have data: loss, its parts, known metrics, and any others.

    A part that equals the loss is left out, and so are counts of zero.
    """
    keys = list(dict.fromkeys(key for run in runs for line in run.lines for key in line))
    known = {chart.key for chart in _KNOWN} | _NO_CHART | {"loss"}
    others = [key for key in keys if key not in known]
    shares = [key for key in others if key.startswith("gradient_share_")]
    charts = [
        _LOSS,
        *(Chart(key, f"loss: {key}", "A part of the loss, without its weight.") for key in others if key not in shares),
        *_KNOWN,
        *(Chart(key, key.replace("_", " "), "Its share of the gradient at the embeddings.") for key in shares),
    ]
    return [chart for chart in charts if any(_has_data(run, chart) for run in runs)][:_MAX_CHARTS]


def _has_data(run: RunFiles, chart: Chart) -> bool:
    """Return whether a run has data for a chart that its loss chart does not show."""
    values = [line[chart.key] for line in run.lines if chart.key in line]
    if chart.summed:
        return any(values)
    losses = [line["loss"] for line in run.lines if "loss" in line]
    return bool(values) and (chart.key == "loss" or values != losses)


def draw_all(paths: Sequence[Path]) -> bytes:
    """Return a PNG of all charts of the runs in these folders. Raises InputError."""
    runs = read_runs(paths)
    groups = group_by_settings(runs)
    parts = [(chart.title, partial(draw, chart, groups, LIGHT)) for chart in select_charts(runs)]
    return sheet(parts, LIGHT, (4.4, 2.9))


def draw(chart: Chart, groups: Sequence[Group], theme: Theme, axes: Any) -> None:
    """Draw the chart's lines of all groups."""
    for group in groups:
        curves = [one for run in group.runs if len((one := _curve(run, chart)).epochs)]
        if not curves:
            continue
        style = style_of(theme, group.number)
        if chart.against:
            _draw_path(axes, thin(curves, _MAX_PATH_POINTS), style.color, group.label)
        else:
            draw_lines(axes, thin(curves, _MAX_POINTS), style, label=group.label, marked=chart.marked)
    for name, level in chart.levels.items():
        axes.axhline(level, linestyle="--", linewidth=1, color=theme.ink)
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 8}
        axes.annotate(name, (0.99, level), xycoords=axes.get_yaxis_transform(), **place)
    if chart.levels:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=chart.against or "epoch", ylabel=chart.key if chart.against else "")
    if not chart.against:
        axes.locator_params(axis="x", integer=True)


def _curve(run: RunFiles, chart: Chart) -> Curve:
    """Return a run's values by epoch; for a path its points, as complex numbers."""
    values = curve([line for line in run.lines if not chart.against or chart.against in line], chart.key)
    if chart.against:
        across = curve([line for line in run.lines if chart.key in line], chart.against)
        return Curve(values.epochs, across.values + 1j * values.values)
    return Curve(values.epochs, chart.factor * (np.cumsum(values.values) if chart.summed else values.values))


def thin(curves: Sequence[Curve], points: int) -> list[Curve]:
    """Return curves as means over `points` equal spans of epochs, if one has more than twice as many values."""
    if max(len(one.epochs) for one in curves) <= 2 * points:
        return list(curves)
    width = max(one.epochs.max() for one in curves) / points
    return [_means(one, width) for one in curves]


def _means(one: Curve, width: float) -> Curve:
    """Return a curve's means over spans of that many epochs, at their centers. A span includes its end."""
    span = np.ceil(one.epochs / width).clip(min=1)
    spans, member = np.unique(span, return_inverse=True)
    sums = np.zeros(len(spans), one.values.dtype)
    np.add.at(sums, member, one.values)
    return Curve((spans - 0.5) * width, sums / np.bincount(member))


def _draw_path(axes: Any, curves: Sequence[Curve], color: str, label: str) -> None:
    """Draw paths in the plane from a ring to a dot."""
    for one in curves if len(curves) > 1 else ():
        axes.plot(one.values.real, one.values.imag, color=color, linewidth=0.7, alpha=0.5)
    mean = mean_of(curves).values
    axes.plot(mean.real, mean.imag, color=color, linewidth=1.5, label=label)
    axes.plot(mean.real[:1], mean.imag[:1], "o", color=color, markerfacecolor="none", markersize=6)
    axes.plot(mean.real[-1:], mean.imag[-1:], "o", color=color, markersize=6)


def last_values(chart: Chart, groups: Sequence[Group]) -> str:
    """Return the newest value of each run, as the text alternative of the picture."""
    texts = []
    for run in (run for group in groups for run in group.runs):
        if len(values := _curve(run, chart).values):
            last = values[-1]
            texts.append(f"{run.name} " + (f"{last.real:.4g} by {last.imag:.4g}" if chart.against else f"{last:.4g}"))
    texts += [f"{name} {level:.4g}" for name, level in chart.levels.items()]
    return f"{chart.title}; last values: {'; '.join(texts)}"
