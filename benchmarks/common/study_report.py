"""The table, the conclusions and the picture of a study's result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import Difference
from benchmarks.common.table import Report
from engine.report.plotting import LIGHT, draw_lines, sheet, style_of
from engine.report.run_folder import curve

_LEVEL = 0.01  # gain of kNN top-1 in the last fifth of epochs below which training has leveled off
COLUMNS = ("knn", "linear", "gain", "gap_midway", "gap", "alignment", "uniformity", "cpu", "seconds", "rate", "reached")
"""Figures of a run: kNN and linear top-1; kNN's gain in the last fifth of epochs; student-teacher gap half-way and at
the end; alignment and uniformity, means over the last fifth; CPU seconds of the training's processes, seconds of
training, pairs a second, and seconds of training to the final kNN top-1 of the study's `reach`."""
COMPARED = ("knn", "linear", "gap_midway", "alignment", "uniformity")
"""Figures whose differences from the base are reported."""

_TITLES = {
    "knn": "kNN top-1, %",
    "linear": "linear top-1, %",
    "gain": "gain",
    "gap_midway": "gap midway",
    "gap": "gap",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "cpu": "CPU, s",
    "seconds": "training, s",
    "rate": "pairs/s",
}
_FACTORS = {"knn": 100.0, "linear": 100.0, "gain": 100.0}
_DIGITS = {"knn": 1, "linear": 1, "gain": 1, "gap_midway": 4, "gap": 4, "alignment": 3, "uniformity": 2, "reached": 1}
_SPOKEN = {"knn": "kNN top-1", "linear": "linear top-1", "gap_midway": "the gap midway"}


def _cell(row: dict[str, Any], column: str) -> str:
    """Return a cell of the table; for `reached` with the number of seeds that did, unless all or none."""
    mean, deviation = row[column]["mean"], row[column]["deviation"]
    if mean is None:
        return "–"
    digits, factor = _DIGITS.get(column, 0), _FACTORS.get(column, 1.0)
    text = f"{factor * mean:.{digits}f}"
    text += "" if deviation is None else f" ± {factor * deviation:.{digits}f}"
    count, seeds = sum(seed[column] is not None for seed in row["every"]), len(row["seeds"])
    return f"{text} ({count} of {seeds} seeds)" if column == "reached" and count < seeds else text


def _difference_cell(row: dict[str, Any]) -> str:
    """Return the difference of kNN top-1 from the base, in points, with its interval."""
    if not (values := row.get("differences", {}).get("knn")):
        return ""
    return Difference(**values).in_points()


def conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence on each difference from a base that its interval carries, and on kNN's in any case."""
    sentences = []
    for row in rows:
        for column, values in row.get("differences", {}).items():
            d = Difference(**values)
            if d.shown or column == "knn":
                sentences.append(_conclusion(row["name"], row["base"], column, d))
    return sentences


def _conclusion(name: str, base: str, column: str, d: Difference) -> str:
    """Return a sentence on a difference, as far as its interval carries it."""
    measure = _SPOKEN.get(column, column)
    if d.low is None or d.high is None:
        return f"{name} has one seed in common with {base}: no interval"
    factor, unit = (100.0, " points") if column in _FACTORS else (1.0, "")
    low, high = factor * d.low, factor * d.high
    if not d.shown:
        interval = f"({low:+.2f} to {high:+.2f}{unit})"
        return f"{name}: no difference in {measure} from {base} that {d.pairs} seeds can show {interval}"
    verb, (low, high) = ("raises", (low, high)) if low > 0 else ("lowers", (-high, -low))
    return f"{name} {verb} {measure} by {low:.2f} to {high:.2f}{unit} against {base}"


def _unsettled(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence on the runs whose kNN top-1 still rose at the end, if any."""
    rising = [row["name"] for row in rows if (row["gain"]["mean"] or 0.0) >= _LEVEL]
    return [f"kNN top-1 rose by a point or more in the last fifth of epochs: {', '.join(rising)}"] * bool(rising)


def report(result: dict[str, Any]) -> Report:
    """Return the table of a result, without columns that no run has."""
    rows = result["rows"]
    titles = {**_TITLES, "reached": f"s to {result['reach']}"}
    shown = [column for column in COLUMNS if any(row[column]["mean"] is not None for row in rows)]
    headings = ["", "seeds", *(titles[column] for column in shown)]
    cells = [[row["name"], str(len(row["seeds"])), *(_cell(row, column) for column in shown)] for row in rows]
    notes = [f"mean ± standard deviation over seeds; {result['at_once']} runs at a time on {result['device']}"]
    if compared := any(row.get("differences") for row in rows):
        place = headings.index(titles["knn"]) + 1
        headings.insert(place, "difference")
        for row, line in zip(rows, cells, strict=True):
            line.insert(place, _difference_cell(row))
        notes.append(
            "difference: kNN top-1 minus the base's, points, paired by seed, with a 95 % interval by Student's t"
        )
    if any(row["alignment"]["mean"] is not None for row in rows):
        notes.append("over the last fifth of epochs: gain of kNN top-1, points; means of alignment and uniformity")
    notes += [*(conclusions(rows) if compared else []), *_unsettled(rows)]
    notes += [f"{name}: {problem}" for name, problem in result["problems"].items()]
    if result["left_out"]:
        notes.append(f"not installed, and left out: {', '.join(result['left_out'])}")
    return Report(f"Study {result['study']}", headings, cells, notes)


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw to a PNG kNN top-1 over epochs, the mean over seeds; each seed's final scores; and differences."""
    shown = [row for row in rows if row["curve"]]
    compared = [row for row in shown if "knn" in row.get("differences", {})]

    def over_epochs(axes: Any) -> None:
        for index, row in enumerate(shown):
            curves = [
                curve([{"epoch": e, "v": 100 * v} for e, v in zip(*seed, strict=True)], "v") for seed in row["curve"]
            ]
            draw_lines(axes, curves, style_of(LIGHT, index), label=row["name"], marked=True)
        axes.set(xlabel="epoch", ylabel="kNN top-1, %")

    def ends(axes: Any) -> None:
        for index, row in enumerate(shown):
            style = style_of(LIGHT, index)
            for key, marker in (("knn", style.marker), ("linear", "_")):
                values = [100 * seed[key] for seed in row["every"] if seed[key] is not None]
                axes.plot([index] * len(values), values, marker, color=style.color, markersize=7)
        axes.set(ylabel="top-1, %", xticks=range(len(shown)))
        axes.set_xticklabels([row["name"] for row in shown], rotation=60, ha="right")

    def from_base(axes: Any) -> None:
        axes.axhline(0, color=LIGHT.ink, linewidth=0.8)
        for index, row in enumerate(compared):
            style, d = style_of(LIGHT, shown.index(row)), Difference(**row["differences"]["knn"])
            half = 0.0 if d.high is None else 100 * (d.high - d.mean)
            axes.errorbar(index, 100 * d.mean, half, fmt=style.marker, color=style.color, markersize=7, capsize=4)
        axes.set(ylabel="points", xticks=range(len(compared)), xlim=(-0.5, len(compared) - 0.5))
        axes.set_xticklabels([row["name"] for row in compared], rotation=60, ha="right")

    out.parent.mkdir(parents=True, exist_ok=True)
    parts = [("while training", over_epochs), ("each seed: kNN (marks), linear (dashes)", ends)]
    parts += [("kNN against the base, 95 % interval", from_base)] * bool(compared)
    out.write_bytes(sheet(parts, LIGHT, (5.4, 3.6), len(parts)))
