"""The page: what the runs did, and how their encoders embed images.

One HTML file that needs no other, with its pictures as PNGs next to it. A run may be unfinished, or lack a part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.report import curves, tsne
from engine.report.compare import Group, differences, group_by_settings, table
from engine.report.gallery import EncoderView, Gallery, GalleryOptions, build_galleries
from engine.report.plotting import DARK, LIGHT, MARKS, uri
from engine.report.run_folder import RunFiles
from engine.report.sample import chance_agreement
from pipeline.system.errors import InputError
from pipeline.system.files import write_atomic

_TEMPLATES = Path(__file__).parent


class Picture(NamedTuple):
    """A picture for light and for dark pages, as data URIs."""

    light: str
    dark: str
    alt: str


class Report(NamedTuple):
    """A page, and the pictures next to it by the ends of their names."""

    html: str
    pictures: dict[str, bytes]


def report(runs: list[RunFiles], options: GalleryOptions | None) -> Report:
    """Return the report on the runs, without pictures of images if there are no options for them."""
    groups = group_by_settings(runs)
    galleries = build_galleries(runs, options) if options else []
    charts, pictures = curves.select_charts(runs), {}
    if charts:
        pictures["curves"] = curves.draw_charts(charts, groups, LIGHT)
    for number, gallery in enumerate(galleries, start=1):
        maps = [(view.run.name, view.points) for view in gallery.views if view.points is not None]
        if maps:
            name = "map" if len(galleries) == 1 else f"map{number}"
            pictures[name] = tsne.draw_maps(maps, gallery.sample, gallery.mapped, LIGHT)
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
        charts=[(chart, _chart(chart, groups)) for chart in charts],
        galleries=[_gallery(gallery) for gallery in galleries],
        neighbors=options.neighbors if options else 0,
        differences=differences(runs),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return Report(html, pictures)


def _chart(chart: curves.Chart, groups: Sequence[Group]) -> Picture:
    light, dark = (uri(curves.draw_chart(chart, groups, theme)) for theme in (LIGHT, DARK))
    return Picture(light, dark, curves.last_values(chart, groups))


def _gallery(gallery: Gallery) -> dict[str, Any]:
    """Return the template's values of a data set."""
    sample = gallery.sample
    return {
        "data": sample.beton.path.name,
        "count": len(sample.ids),
        "size": gallery.size,
        "classes": sample.classes if sample.labeled else 0,
        "chance": chance_agreement(sample.labels),
        "seed": sample.seed,
        "views": gallery.views,
        "queries": [_query(gallery, number) for number in range(len(sample.queries))],
        "maps": [(view, _map(gallery, view)) for view in gallery.views if view.points is not None],
        "mapped": len(gallery.mapped),
        "legend": [sample.name(int((sample.labels == label).argmax())) for label in tsne.frequent_labels(sample)],
    }


def _query(gallery: Gallery, number: int) -> dict[str, Any]:
    """Return the template's values of an image and its neighbors by each encoder."""
    sample = gallery.sample
    query = int(sample.queries[number])
    rows = []
    for view in gallery.views:
        assert view.near is not None
        near = [
            {
                "picture": sample.picture(int(other)),
                "name": sample.name(int(other)),
                "cosine": float(cosine),
                "right": bool(sample.labels[other] == sample.labels[query]) if sample.labeled else None,
            }
            for other, cosine in zip(view.near.positions[number], view.near.cosines[number], strict=True)
        ]
        rows.append((view, near))
    return {"picture": sample.picture(query), "name": sample.name(query), "rows": rows}


def _map(gallery: Gallery, view: EncoderView) -> Picture:
    assert view.points is not None
    light, dark = (uri(tsne.draw_map(view.points, gallery.sample, gallery.mapped, theme)) for theme in (LIGHT, DARK))
    return Picture(light, dark, f"Map of {len(gallery.mapped)} images by the features of {view.run.name}")


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
