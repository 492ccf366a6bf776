"""Curves of runs over epochs: which there are, and how each is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engine.report.compare import Group
from engine.report.plotting import Theme, draw_lines, mean_of, picture, sheet, style_of
from engine.report.run_folder import Curve, RunFiles, curve

POINTS = 250
"""Where runs have more than twice as many lines, each point drawn is the mean over one of so many equal spans."""
_TRAJECTORY = 16  # points of a path, at most: measures of single steps jump about
_MOST = 40  # charts


@dataclass(frozen=True)
class Chart:
    """A metric over epochs, or where `against` is given, over another metric."""

    key: str
    title: str
    says: str = ""
    """In a sentence, what it tells."""
    factor: float = 1.0
    marked: bool = False
    summed: bool = False
    """Of counts: as their sum since the start."""
    against: str = ""


_LOSS = Chart("loss", "loss", "All terms with their weights. Losses of different methods do not compare.")
_KNOWN = (
    Chart(
        "knn_top1", "kNN top-1, %", "Nearest neighbors in the backbone's features, while training.", 100, marked=True
    ),
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
    Chart("embedding_std", "deviation of the embeddings × √C", "About 1 on the whole sphere, 0 when collapsed."),
    Chart("effective_rank", "effective rank of the embeddings", "Dimensions in use: at most C, and the batch."),
    Chart("positive_similarity", "similarity of positive pairs", "Cosine of a query and its own key."),
    Chart("negative_similarity", "similarity of negative pairs", "Mean cosine of a query and the negatives."),
    Chart("lr", "learning rate"),
    Chart("momentum", "momentum", "Of the momentum encoder."),
    Chart("pairs_per_second", "pairs/s", "Over all processes, training alone."),
    Chart("data_wait_fraction", "data-wait, %", "Share of the time spent waiting for data.", 100),
    Chart("skipped", "skipped steps", "Since the start: loss or gradients were not finite.", summed=True),
    Chart("substituted", "substituted samples", "Since the start: they stood in for damaged ones.", summed=True),
)
_NO_CHART = {"step", "epoch", "uniformity"}


def charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the charts that these runs have anything for: loss, its parts, what is known, and whatever else there is.

    A part is left out where it is all of the loss, and counts where there is nothing to count.
    """
    keys = list(dict.fromkeys(key for run in runs for line in run.lines for key in line))
    known = {chart.key for chart in _KNOWN} | _NO_CHART | {"loss"}
    others = [key for key in keys if key not in known]
    shares = [key for key in others if key.startswith("gradient_share_")]
    parts = [
        Chart(key, f"loss: {key}", "A part of the loss, without its weight.") for key in others if key not in shares
    ]
    found = [
        _LOSS,
        *parts,
        *_KNOWN,
        *(Chart(key, key.replace("_", " "), "Its share of the gradient at the embeddings.") for key in shares),
    ]
    return [chart for chart in found if any(_has(run, chart) for run in runs)][:_MOST]


def _has(run: RunFiles, chart: Chart) -> bool:
    """Return whether a run has anything to show there that no other chart of it shows."""
    values = [line[chart.key] for line in run.lines if chart.key in line]
    if chart.summed:
        return any(values)
    whole = [line["loss"] for line in run.lines if "loss" in line]
    return bool(values) and (chart.key == "loss" or values != whole)


def draw(chart: Chart, groups: Sequence[Group], theme: Theme, axes: Any) -> None:
    """Draw the chart's lines of all groups that have any."""
    for group in groups:
        found = [one for run in group.runs if len((one := _curve(run, chart)).epochs)]
        if not found:
            continue
        label, look = group.label, style_of(theme, group.number)
        if chart.against:
            _draw_path(axes, thinned(found, _TRAJECTORY), look.color, label)
        else:
            draw_lines(axes, thinned(found, POINTS), look, label=label, marked=chart.marked)
    axes.set(xlabel=chart.against or "epoch", ylabel=chart.key if chart.against else "")
    if not chart.against:
        axes.locator_params(axis="x", integer=True)


def _curve(run: RunFiles, chart: Chart) -> Curve:
    """Return a run's values by epoch; of a path its places, as complex numbers."""
    found = curve([line for line in run.lines if not chart.against or chart.against in line], chart.key)
    if chart.against:
        across = curve([line for line in run.lines if chart.key in line], chart.against)
        return Curve(found.epochs, across.values + 1j * found.values)
    values = np.cumsum(found.values) if chart.summed else found.values
    return Curve(found.epochs, chart.factor * values)


def thinned(curves: Sequence[Curve], points: int) -> list[Curve]:
    """Return curves as means over `points` equal spans of epochs, where one has more than twice as many values."""
    if max(len(one.epochs) for one in curves) <= 2 * points:
        return list(curves)
    width = max(one.epochs.max() for one in curves) / points
    return [_means(one, width) for one in curves]


def _means(one: Curve, width: float) -> Curve:
    """Return a curve's means over spans of that many epochs, each at its middle; a value belongs to the span before."""
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


def alone(chart: Chart, groups: Sequence[Group], theme: Theme) -> bytes:
    """Return the chart as a PNG, without title and legend."""
    return picture(partial(draw, chart, groups, theme), theme)


def together(shown: Sequence[Chart], groups: Sequence[Group], theme: Theme) -> bytes:
    """Return all charts as one PNG, with titles and a legend."""
    parts = [(chart.title, partial(draw, chart, groups, theme)) for chart in shown]
    return sheet(parts, theme, (4.4, 2.9))


def last_values(chart: Chart, groups: Sequence[Group]) -> str:
    """Return the newest value of each run in words, for those who do not see the picture."""
    told = []
    for run in (run for group in groups for run in group.runs):
        if len(values := _curve(run, chart).values):
            at = f"{values[-1].real:.4g} by {values[-1].imag:.4g}" if chart.against else f"{values[-1]:.4g}"
            told.append(f"{run.name} {at}")
    return f"{chart.title}; last values: {'; '.join(told)}"
