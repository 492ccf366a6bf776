"""Plots of runs: themes for light and dark pages, and lines over epochs."""

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from engine.report.run_folder import Curve, curve, read_metrics

_DPI = 160
_MAX_CHARACTERS = 60  # characters of a name in a picture
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS, MARKS = "o^sDvp", "●▲■◆▼⬟"
"""Shapes of points, for matplotlib and as text."""


class Theme(NamedTuple):
    """Colors of pictures and page."""

    background: str
    ink: str
    faint: str
    """Color of frames and grids."""
    colors: tuple[str, ...]
    """Colors of runs and classes: contrast with the background 3 or more, and distinct also for readers who cannot see
    red or green."""


LIGHT = Theme("#ffffff", "#1f2328", "#d9dde2", ("#1764d2", "#d8560c", "#36a18a", "#6a1400", "#c066c6"))
DARK = Theme("#16191d", "#e8eaed", "#3a4048", ("#5c9dff", "#ffb000", "#2fd6b5", "#e0503a", "#d9b8f5"))


class Style(NamedTuple):
    """Look of the lines or points of a run or class: a color, and dashes or a shape once colors repeat."""

    color: str
    dashes: Any
    marker: str


def style_of(theme: Theme, number: int) -> Style:
    """Return the style of run or class `number`, from 0."""
    cycle, index = divmod(number, len(theme.colors))
    return Style(theme.colors[index], DASHES[cycle % len(DASHES)], MARKERS[cycle % len(MARKERS)])


def picture(
    draw: Callable[[Any], None],
    theme: Theme = LIGHT,
    size: tuple[float, float] = (4.6, 2.7),
    grid: tuple[int, int] = (1, 1),
) -> bytes:
    """Return a PNG drawn by `draw` on axes, or for a grid on an array of axes [rows, columns]; size: inches."""
    settings: dict[Any, Any] = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
        "axes.grid": True,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "font.size": 9,
        "text.parse_math": False,  # names come from runs, whose dollar signs are literal
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink),
    }
    out = io.BytesIO()
    with plt.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in other scripts
        figure, axes = plt.subplots(*grid, figsize=size, layout="constrained")
        try:
            draw(axes)
            figure.savefig(out, dpi=_DPI, metadata={"Software": None})
        finally:
            plt.close(figure)
    return out.getvalue()


def uri(content: bytes, kind: str = "png") -> str:
    """Return a picture's bytes as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def sheet(
    parts: Sequence[tuple[str, Callable[[Any], None]]], theme: Theme, cell: tuple[float, float], columns: int = 3
) -> bytes:
    """Return one PNG of several axes, each with a title and its drawing, above a common legend.

    cell: width and height of one, inches.
    """
    columns = min(columns, len(parts))
    rows = -(-len(parts) // columns)

    def draw(grid: Any) -> None:
        every = np.atleast_1d(grid).flatten()
        for (title, draw_one), axes in zip(parts, every, strict=False):
            draw_one(axes)
            axes.set_title(_short(title), loc="left")
        for axes in every[len(parts) :]:
            axes.set_axis_off()
        pairs = [pair for axes in every for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        by_label = {label: handle for handle, label in reversed(pairs)}
        if by_label:
            handles, labels = list(by_label.values())[::-1], list(by_label)[::-1]
            columns_of_names = max(1, int(columns * 50 / (6 + max(len(label) for label in labels))))
            every[0].figure.legend(handles, labels, loc="outside lower left", ncols=columns_of_names)

    return picture(draw, theme, (cell[0] * columns, cell[1] * rows + 0.5), (rows, columns))


def _short(name: str) -> str:
    """Return a name as a label. matplotlib hides labels that begin with an underscore."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= _MAX_CHARACTERS else name[: _MAX_CHARACTERS - 1] + "…"


def draw_lines(axes: Any, curves: Sequence[Curve], style: Style, *, label: str = "", marked: bool = False) -> None:
    """Draw one run's curve, or several as thin lines with their mean; marked: with a mark at each value."""
    options = {"color": style.color, "linestyle": style.dashes, "markersize": 4}
    for single in curves if len(curves) > 1 else ():
        axes.plot(*single, **options, linewidth=0.7, alpha=0.6)
    mean = mean_of(curves)
    mark = style.marker if marked or len(mean.epochs) == 1 else ""
    axes.plot(*mean, **options, linewidth=1.7, marker=mark, label=_short(label))


def mean_of(curves: Sequence[Curve]) -> Curve:
    """Return the mean of curves at their common epochs."""
    rows = [dict(zip(curve.epochs.round(4).tolist(), curve.values.tolist(), strict=True)) for curve in curves]
    shared = sorted(set(rows[0]).intersection(*rows[1:]))
    return Curve(np.array(shared), np.array([np.mean([row[epoch] for row in rows]) for epoch in shared]))


def curves(metrics: Path, out: Path, levels: Mapping[str, float]) -> None:
    """Draw loss and kNN top-1 of a metrics.jsonl over epochs to a PNG, `out`; levels: kNN baselines by name."""
    lines, _ = read_metrics(metrics)
    losses, top1 = curve(lines, "loss"), curve(lines, "knn_top1")

    def draw(axes: Any) -> None:
        left, right = axes
        draw_lines(left, [losses], style_of(LIGHT, 0))
        left.set(xlabel="epoch", ylabel="loss")
        if len(top1.epochs):
            percent = top1._replace(values=100 * top1.values)
            draw_lines(right, [percent], style_of(LIGHT, 0), label="trained encoder", marked=True)
        for number, (name, level) in enumerate(levels.items(), start=1):
            right.axhline(100 * level, linestyle="--", color=style_of(LIGHT, number).color, label=name)
        right.set(xlabel="epoch", ylabel="kNN top-1, %", ylim=(0, 100))
        if len(top1.epochs) or levels:
            right.legend()

    out.write_bytes(picture(draw, size=(10, 4), grid=(1, 2)))
