"""The page: curves and numbers of runs, and images with their neighbors by each encoder.

One HTML file that needs no other, with its pictures as PNGs next to it. A run may be unfinished, or lack a part.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.report import curves, tsne
from engine.report.compare import differences, group_by_settings, table
from engine.report.gallery import EncoderView, Gallery, GalleryOptions, build_galleries
from engine.report.plotting import DARK, LIGHT, MARKS, Theme, picture, sheet, uri
from engine.report.run_folder import RunFiles
from engine.report.sample import chance_agreement
from pipeline.system.errors import InputError
from pipeline.system.files import write_atomic

_TEMPLATES = Path(__file__).parent
Draw = Callable[[Theme, Any], None]
"""Draws on axes, in a theme."""


class Picture(NamedTuple):
    """A picture for light and for dark pages, as data URIs."""

    light: str
    dark: str
    alt: str


class Report(NamedTuple):
    """A page, and the pictures next to it by the ends of their names."""

    html: str
    pictures: dict[str, bytes]


def report(
    runs: list[RunFiles], options: GalleryOptions | None, *, baselines: Mapping[str, float] | None = None
) -> Report:
    """Return the report on the runs, without pictures of images if there are no options for them.

    baselines: kNN top-1 by name, drawn into its chart.
    """
    groups = group_by_settings(runs)
    charts: list[tuple[curves.Chart, Draw]] = []
    for chart in curves.select_charts(runs):
        if chart.key == "knn_top1" and baselines:
            chart = replace(chart, levels={name: 100 * top1 for name, top1 in baselines.items()})
        charts.append((chart, partial(curves.draw, chart, groups)))
    galleries = [(gallery, _maps(gallery)) for gallery in (build_galleries(runs, options) if options else [])]
    pictures = {}
    if charts:
        pictures["curves"] = sheet([(chart.title, partial(draw, LIGHT)) for chart, draw in charts], LIGHT, (4.4, 2.9))
    for number, (_, maps) in enumerate(galleries, start=1):
        if maps:
            parts = [(view.title, partial(draw, LIGHT)) for view, draw in maps]
            pictures["map" if len(galleries) == 1 else f"map{number}"] = sheet(parts, LIGHT, (3.9, 3.6))
    titles, rows = table(groups)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html").render(
        runs=runs,
        groups=groups,
        group_of={run.name: group.number for group in groups for run in group.runs},
        colors=range(len(LIGHT.colors)),
        themes={"light": LIGHT, "dark": DARK},
        marks=MARKS,
        titles=titles,
        rows=rows,
        charts=[(chart, _picture(draw, curves.last_values(chart, groups))) for chart, draw in charts],
        galleries=[
            (gallery, [(view, _picture(draw, _describe(gallery, view), (4.4, 3.8))) for view, draw in maps])
            for gallery, maps in galleries
        ],
        chance_agreement=chance_agreement,
        frequent_labels=tsne.frequent_labels,
        zip=zip,
        paired=options is not None and options.untrained is not None,
        neighbors=options.neighbors if options else 0,
        differences=differences(runs),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return Report(html, pictures)


def _maps(gallery: Gallery) -> list[tuple[EncoderView, Draw]]:
    """Return the encoders that have a map, with its drawing."""
    mapped = [(view, view.points) for view in gallery.views if view.points is not None]
    return [(view, partial(tsne.draw, points, gallery.sample, gallery.mapped)) for view, points in mapped]


def _describe(gallery: Gallery, view: EncoderView) -> str:
    return f"Map of {len(gallery.mapped)} images by the features of {view.title}"


def _picture(draw: Draw, alt: str, size: tuple[float, float] = (4.6, 2.7)) -> Picture:
    light, dark = (uri(picture(partial(draw, theme), theme, size)) for theme in (LIGHT, DARK))
    return Picture(light, dark, alt)


def write(page: Report, out: Path) -> list[Path]:
    """Write the page to `out`, and the pictures next to it; return the files. Raises InputError."""
    files = {out.with_name(f"{out.stem}-{name}.png"): content for name, content in page.pictures.items()}
    files[out] = page.html.encode("utf-8", "backslashreplace")
    for path, content in files.items():
        try:
            write_atomic(path, content)
        except OSError as error:
            raise InputError(
                f"--out {out}: cannot be written ({error.strerror or error}): choose another path"
            ) from None
    return [*files]
