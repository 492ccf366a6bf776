"""A page that shows what runs did, and what their encoders see:  python -m engine.report RUN [RUN ...]

One HTML file that needs nothing else, and its pictures as PNGs beside it. A run may be unfinished, or lack a part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.pages import charts, maps
from engine.pages.compare import Group, differences, grouped, table
from engine.pages.nearest import by_chance
from engine.pages.seen import Gallery, Seen, Wanted, look
from engine.plot import DARK, LIGHT, MARKS, uri
from engine.run_files import RunFiles, read_runs
from pipeline.system.errors import InputError, command
from pipeline.system.files import write_whole

_TEMPLATES = Path(__file__).with_name("pages")


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
    shown, pictures = charts.charts(runs), {}
    if shown:
        pictures["curves"] = charts.together(shown, groups, LIGHT)
    for number, gallery in enumerate(galleries, start=1):
        mapped = [(seen.run.name, seen.places) for seen in gallery.seen if seen.places is not None]
        if mapped:
            name = "map" if len(galleries) == 1 else f"map{number}"
            pictures[name] = maps.together(mapped, gallery.sample, gallery.shown, LIGHT)
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
        colours=range(len(LIGHT.colours)),
        themes={"light": LIGHT, "dark": DARK},
        marks=MARKS,
        titles=titles,
        rows=rows,
        charts=[(chart, _chart(chart, groups)) for chart in shown],
        galleries=[_gallery(gallery) for gallery in galleries],
        neighbours=wanted.neighbours if wanted else 0,
        differences=differences(runs),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return Report(html, pictures)


def _chart(chart: charts.Chart, groups: Sequence[Group]) -> Picture:
    light, dark = (uri(charts.alone(chart, groups, theme)) for theme in (LIGHT, DARK))
    return Picture(light, dark, charts.last_values(chart, groups))


def _gallery(gallery: Gallery) -> dict[str, Any]:
    """Return what the page shows of a data set."""
    of = gallery.sample
    return {
        "data": of.beton.path.name,
        "count": len(of.ids),
        "size": gallery.size,
        "classes": of.classes if of.labelled else 0,
        "chance": by_chance(of.labels),
        "seed": of.seed,
        "seen": gallery.seen,
        "queries": [_query(gallery, number) for number in range(len(of.queries))],
        "maps": [(seen, _map(gallery, seen)) for seen in gallery.seen if seen.places is not None],
        "mapped": len(gallery.shown),
        "legend": [of.name(int((of.labels == label).argmax())) for label in maps.frequent(of)],
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
                "right": bool(of.labels[other] == of.labels[place]) if of.labelled else None,
            }
            for other, cosine in zip(seen.near.places[number], seen.near.cosines[number], strict=True)
        ]
        rows.append((seen, near))
    return {"picture": of.picture(place), "name": of.name(place), "rows": rows}


def _map(gallery: Gallery, seen: Seen) -> Picture:
    assert seen.places is not None
    light, dark = (uri(maps.alone(seen.places, gallery.sample, gallery.shown, theme)) for theme in (LIGHT, DARK))
    return Picture(light, dark, f"Map of {len(gallery.shown)} images by the features of {seen.run.name}")


def write(made: Report, to: Path) -> list[Path]:
    """Write the page to `to`, and the pictures beside it; return the files. Raises InputError."""
    files = {to.with_name(f"{to.stem}-{name}.png"): content for name, content in made.pictures.items()}
    files[to] = made.html.encode("utf-8", "backslashreplace")
    for path, content in files.items():
        try:
            write_whole(path, content)
        except OSError as error:
            raise InputError(
                f"--out {to}: cannot be written ({error.strerror or error}): choose another place"
            ) from None
    return [*files]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.report", description="Write a page on one or several runs: curves, numbers, pictures."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, of any state")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="(default: RUN/report.html; ./report.html for several)"
    )
    parser.add_argument(
        "--data", default="", help="images for the pictures (default: the run's data.eval, or data.train)"
    )
    parser.add_argument("--neighbours", type=int, default=8, metavar="N", help="shown of each image (default: 8)")
    parser.add_argument("--limit", type=int, default=2000, metavar="N", help="images looked at (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (default: 0)")
    parser.add_argument("--which", choices=["online", "momentum"], default="online", help="encoder (default: online)")
    parser.add_argument("--no-pictures", action="store_true", help="curves and tables alone, which takes seconds")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    return parser.parse_args()


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work."""
    if not 1 <= args.neighbours <= 100:
        raise InputError(f"--neighbours {args.neighbours}: choose 1 to 100")
    if not 10 <= args.limit <= 100_000:
        raise InputError(f"--limit {args.limit}: choose 10 to 100000 images")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: choose 0 or more")
    if args.out and args.out.suffix != ".html":
        raise InputError(f"--out {args.out}: name a file that ends in .html")


@command
def main() -> None:
    args = _arguments()
    _check(args)
    runs = read_runs(args.runs)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    wanted = Wanted(args.data, args.neighbours, args.limit, args.seed, args.which, device)
    made = report(runs, None if args.no_pictures else wanted)
    to = args.out or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))
    files = write(made, to)
    for run in runs:
        for sentence in run.missing:
            print(f"{run.name}: {sentence}", file=sys.stderr)
    print(f"written: {', '.join(map(str, files[::-1]))}")


if __name__ == "__main__":
    main()
