"""All results on one page: goals, headlines, and every result with its machine, versions and command.

    python -m benchmarks.report [--results benchmarks/results] [--readme README.md]

Reads the dated files of the results folder and writes `report.md` and `report.html` into it. Of each series of results
(`DATE-SERIES.json`, `DATE-SERIES.md`) the newest is shown, and older ones are linked. With --readme, rewrites the
tables between the marks in the README; a test fails if they are out of date.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.figures import CONDITIONS, GOALS, HEADLINES, Goal, Result, Results, study_table
from engine.report.plotting import LIGHT, picture, style_of, uri
from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError, command

BEGIN, END = "<!-- begin: python -m benchmarks.report -->", "<!-- end -->"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #d9dde2; padding: .3rem .7rem; text-align: left; vertical-align: top }
td[style*="right"], th[style*="right"] { white-space: nowrap }
code, pre { font-size: .9em; background: #f4f5f7 } pre { padding: .6rem; overflow-x: auto }
img { max-width: 100% } h2 { border-top: 1px solid #d9dde2; padding-top: 1rem; margin-top: 2.5rem }
@media (prefers-color-scheme: dark) {
  body { background: #16191d; color: #e8eaed } td, th, h2 { border-color: #3a4048 } code, pre { background: #22262c }
  a { color: #8ab4f8 } img { background: #fff }
}
"""


@dataclass(frozen=True)
class Bars:
    """A picture of a result: bars by name, with minimum and maximum."""

    title: str
    series: str
    unit: str
    spreads: Callable[[Result], dict[str, dict[str, float]]]


_LABELS = {
    "resident": "resident (decoded once)",
    "decode-only": "ffcv, where a GPU crops",
    "ffcv": "ffcv",
    "dali": "dali, on the CPU",
    "ffcv-twice": "FFCV's own loader",
    "official": "official MoCo's loader",
    "eager": "ours",
    "compiled": "ours, compiled",
    "official-amp": "official, bf16",
    "lightly-amp": "lightly, bf16",
}
_PEERS = ("FFCV", "official", "lightly")


def _loader(result: Result) -> dict[str, dict[str, float]]:
    rows = [row for row in result["in500"]["paths"].values() if row["threads"] == 1]
    return {_LABELS[row["name"]]: row["cpu"] for row in rows if row["name"] in _LABELS}


def _step(result: Result) -> dict[str, dict[str, float]]:
    return {_LABELS.get(name, name): ratio for name, ratio in result["ratio_to_official"].items()}


PICTURES = (
    Bars("Pairs of 224-pixel crops a second of one core, ImageNet originals", "loader", "pairs/s", _loader),
    Bars("ResNet-18, 32 px, CPU: steps against the official loop", "step-resnet18-cpu", "times", _step),
    Bars("ResNet-50, 224 px, CPU: steps against the official loop", "step-resnet50-cpu", "times", _step),
)


def headline_tables(results: Results) -> str:
    """Return the README's tables of results, as Markdown."""
    rows = [" | ".join(row) for headline in HEADLINES for row in headline(results)]
    first = "\n".join(["| measured | | machine |", "|---|---|---|", *(f"| {row} |" for row in rows)])
    return "\n\n".join(filter(None, (first, CONDITIONS, study_table(results))))


def goal_table(results: Results, goals: Sequence[Goal] = GOALS) -> str:
    """Return goals, measurements and verdicts as Markdown."""
    lines = ["| goal | bound | measured, newest first | |", "|---|--:|---|---|"]
    for goal in goals:
        measured, verdict = goal.judge(results)
        lines.append(f"| {goal.title} | {goal.bound_text} | {measured} | {verdict} |")
    return "\n".join(lines)


def page(results: Results, image: Callable[[str, bytes], str]) -> str:
    """Return the page as Markdown. image: (name, PNG) to the picture's reference."""
    parts = ["# Results", "Written by `python -m benchmarks.report` from the files next to it.", "## Goals"]
    parts += [goal_table(results), "## Headlines", headline_tables(results)]
    for bars in PICTURES:
        if result := results.newest(bars.series):
            parts.append(f"![{bars.title}]({image(f'{bars.series}.png', _draw(bars, result))})")
    for series in results.series():
        parts.append(_section(results, series, image))
    return "\n\n".join(parts) + "\n"


def _section(results: Results, series: str, image: Callable[[str, bytes], str]) -> str:
    """Return the newest result of a series, and links to the others."""

    def links(paths: Iterable[Path]) -> str:
        return ", ".join(f"[{path.name}]({path.name})" for path in paths)

    newest, *older = results.files(series)
    text = newest[".md"].read_text() if ".md" in newest else f"# {series}"
    parts = [re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE).strip()]
    if picture := newest.pop(".png", None):
        parts.append(f"![{series}]({image(picture.name, picture.read_bytes())})")
    earlier = [path for files in older for path in files.values()]
    parts.append(f"Files: {links(newest.values())}." + (f" Earlier: {links(earlier)}." if earlier else ""))
    return "\n\n".join(parts)


def _draw(bars: Bars, result: Result) -> bytes:
    """Return a PNG of bars with their spread, other projects' in gray."""
    spreads = dict(sorted(bars.spreads(result).items(), key=lambda item: item[1]["median"]))

    def draw(axes: Any) -> None:
        for index, (name, spread) in enumerate(spreads.items()):
            below, above = spread["median"] - spread["min"], spread["max"] - spread["median"]
            color = "0.7" if name.startswith(_PEERS) else style_of(LIGHT, 0).color
            axes.barh(index, spread["median"], color=color, xerr=[[below], [above]])
        axes.set_yticks(range(len(spreads)), list(spreads))
        axes.set(title=bars.title, xlabel=bars.unit)

    return picture(draw, size=(7.0, 0.45 * len(spreads) + 1.2))


def as_html(markdown_text: str) -> str:
    """Return the page as one HTML file."""
    from markdown import markdown

    body = markdown(markdown_text, extensions=["tables", "fenced_code"])
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Millrace: results</title>"
    return f"<!doctype html><html lang='en'><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n"


def embedded(name: str, content: bytes) -> str:
    """Return a picture as a data URI."""
    return uri(content)


def with_tables(readme: str, tables: str) -> str:
    """Return the README with the tables between the marks. Raises InputError without them."""
    begin, end = readme.find(BEGIN), readme.find(END)
    if not 0 <= begin < end:
        raise InputError(f"the README has no {BEGIN} ... {END}: put these lines where the tables belong")
    return f"{readme[: begin + len(BEGIN)]}\n{tables}\n{readme[end:]}"


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="python -m benchmarks.report", description="All results on one page.")
    default = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=default, metavar="DIR", help="folder of dated results")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="rewrite the tables of this file")
    return parser


@command
def main() -> None:
    args = parser().parse_args()
    results = Results(args.results)
    pictures = args.results / "pictures"

    def linked(name: str, content: bytes) -> str:
        if (args.results / name).exists():
            return name
        pictures.mkdir(exist_ok=True)
        (pictures / name).write_bytes(content)
        return f"pictures/{name}"

    (args.results / "report.md").write_text(page(results, linked))
    (args.results / "report.html").write_text(as_html(page(results, embedded)))
    if args.readme is not None:
        args.readme.write_text(with_tables(args.readme.read_text(), headline_tables(results)))
    print(f"written: {args.results / 'report.md'}, {args.results / 'report.html'}")


if __name__ == "__main__":
    main()
