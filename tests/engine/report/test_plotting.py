"""Means of curves, contrast of colors, names in pictures."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.report import page
from engine.report.plotting import DARK, LIGHT, MARKERS, MARKS, mean_of, sheet
from engine.report.run_folder import Curve


def test_a_mean_is_over_common_epochs() -> None:
    curves = [Curve(np.arange(1.0, n), 2.0 * np.arange(1.0, n) + shift) for n, shift in ((6, 0), (4, 1), (5, 5))]
    mean = mean_of(curves)
    assert mean.epochs.tolist() == [1, 2, 3]
    assert mean.values.tolist() == [4, 6, 8]


def _contrast(one: str, other: str) -> float:
    """Return the contrast of two colors (WCAG 2.2)."""
    both = []
    for color in (one, other):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        both.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(both) + 0.05) / (min(both) + 0.05)


def test_colors_stand_out_from_their_background() -> None:
    for theme in (LIGHT, DARK):
        assert all(_contrast(color, theme.background) >= 3 for color in theme.colors)
        assert _contrast(theme.ink, theme.background) >= 7
    style = (Path(page.__file__).with_name("page.html")).read_text()
    for theme, colors in zip(
        (LIGHT, DARK), re.findall(r"--muted: (\S+); --tint: (\S+); --right: (\S+);", style), strict=True
    ):
        assert all(_contrast(color, theme.background) >= 4.5 for color in (colors[0], colors[2]))
    assert len(MARKS) == len(MARKERS)


@pytest.mark.usefixtures("rendered")
def test_names_are_drawn_literally() -> None:
    content = sheet([("$\\frac{$", lambda axes: axes.plot([1, 2], label="$_{$"))], LIGHT, (3, 2))
    assert Image.open(BytesIO(content)).size[0] > 300
