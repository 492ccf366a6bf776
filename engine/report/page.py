"""A page that shows what runs did, and what their encoders see

One HTML file that needs nothing else, and its pictures as PNGs beside it. A run may be unfinished, or lack a part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.report import curves, tsne
from engine.report.compare import Group, differences, grouped, table
from engine.report.gallery import Gallery, Seen, Wanted, look
from engine.report.plotting import DARK, LIGHT, MARKS, uri
from engine.report.run_folder import RunFiles
from engine.report.sample import by_chance
from pipeline.system.errors import InputError
from pipeline.system.files import write_atomic

_TEMPLATES = Path(__file__).parent


class Picture(NamedTuple):
    """A picture for light and for dark pages, as data URIs."""

    light: str
    dark: str
    alt: str


class Report(NamedTuple):
    """A page, and pictures to lie beside it by the ends of their names."""

    html: str
    pictures: dict[str, bytes]


def report(runs: list[RunFiles], wanted: Wanted | None) -> Report:
    """Return the report on those runs; with pictures of images as `wanted` has it, None: without."""
    groups = grouped(runs)
    galleries = look(runs, wanted) if wanted else []
    shown, pictures = curves.charts(runs), {}
    if shown:
        pictures["curves"] = curves.together(shown, groups, LIGHT)
    for number, gallery in enumerate(galleries, start=1):
        mapped = [(seen.run.name, seen.places) for seen in gallery.seen if seen.places is not None]
        if mapped:
            name = "map" if len(galleries) == 1 else f"map{number}"
            pictures[name] = tsne.together(mapped, gallery.sample, gallery.shown, LIGHT)
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
        charts=[(chart, _chart(chart, groups)) for chart in shown],
        galleries=[_gallery(gallery) for gallery in galleries],
        neighbors=wanted.neighbors if wanted else 0,
        differences=differences(runs),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return Report(html, pictures)


def _chart(chart: curves.Chart, groups: Sequence[Group]) -> Picture:
    light, dark = (uri(curves.alone(chart, groups, theme)) for theme in (LIGHT, DARK))
    return Picture(light, dark, curves.last_values(chart, groups))


def _gallery(gallery: Gallery) -> dict[str, Any]:
    """Return what the page shows of a data set."""
    of = gallery.sample
    return {
        "data": of.beton.path.name,
        "count": len(of.ids),
        "size": gallery.size,
        "classes": of.classes if of.labeled else 0,
        "chance": by_chance(of.labels),
        "seed": of.seed,
        "seen": gallery.seen,
        "queries": [_query(gallery, number) for number in range(len(of.queries))],
        "maps": [(seen, _map(gallery, seen)) for seen in gallery.seen if seen.places is not None],
        "mapped": len(gallery.shown),
        "legend": [of.name(int((of.labels == label).argmax())) for label in tsne.frequent(of)],
    }


def _query(gallery: Gallery, number: int) -> dict[str, Any]:
    """Return an image and what each encoder holds for most alike."""
    of = gallery.sample
    place = int(of.queries[number])
    rows = []
    for seen in gallery.seen:
        assert seen.near is not None
        near = [
            {
                "picture": of.picture(int(other)),
                "name": of.name(int(other)),
                "cosine": float(cosine),
                "right": bool(of.labels[other] == of.labels[place]) if of.labeled else None,
            }
            for other, cosine in zip(seen.near.places[number], seen.near.cosines[number], strict=True)
        ]
        rows.append((seen, near))
    return {"picture": of.picture(place), "name": of.name(place), "rows": rows}


def _map(gallery: Gallery, seen: Seen) -> Picture:
    assert seen.places is not None
    light, dark = (uri(tsne.alone(seen.places, gallery.sample, gallery.shown, theme)) for theme in (LIGHT, DARK))
    return Picture(light, dark, f"Map of {len(gallery.shown)} images by the features of {seen.run.name}")


def write(made: Report, to: Path) -> list[Path]:
    """Write the page to `to`, and the pictures beside it; return the files. Raises InputError."""
    files = {to.with_name(f"{to.stem}-{name}.png"): content for name, content in made.pictures.items()}
    files[to] = made.html.encode("utf-8", "backslashreplace")
    for path, content in files.items():
        try:
            write_atomic(path, content)
        except OSError as error:
            raise InputError(
                f"--out {to}: cannot be written ({error.strerror or error}): choose another place"
            ) from None
    return [*files]
