"""Medians and spreads, and the table in which a benchmark prints and writes them."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine
from pipeline.system.files import write_json


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": float(np.median(values)), "min": float(min(values)), "max": float(max(values))}


def spread_cells(spread: dict[str, float], form: str, factor: float = 1.0) -> list[str]:
    """Return median, minimum and maximum, multiplied by `factor`, as text."""
    return [form.format(factor * spread[kind]) for kind in ("median", "min", "max")]


def spread_cell(spread: dict[str, float], form: str, factor: float = 1.0) -> str:
    """Return `median (min-max)`, multiplied by `factor`."""
    return "{} ({}-{})".format(*spread_cells(spread, form, factor))


@dataclass
class Report:
    """A table with notes. The first column names the rows and is left-aligned."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Return the table for a terminal."""
        table = Table(box=None)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return table and notes as Markdown."""
        rule = ["---", *["--:"] * (len(self.headings) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.headings, rule, *self.rows)]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])


def publish(make_report: Callable[[dict[str, Any]], Report], args: argparse.Namespace, **result: Any) -> None:
    """Print the report of a result with its `machine`, and write both to the files of `args`, if any."""
    report, about = make_report(result), result["machine"]
    hardware, versions = machine.hardware(about), machine.versions(about)
    print(f"{hardware}\n{about['date']}, {versions}")
    Console(width=160).print(report.table())
    for note in report.notes:
        print(note)
    for file in filter(None, (args.json, args.markdown)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if args.json is not None:
        write_json(args.json, result)
    if args.markdown is not None:
        module = getattr(sys.modules["__main__"].__spec__, "name", "")
        call = f"    python -m {module} {shlex.join(sys.argv[1:])}"
        head = f"# {report.title}\n\n{about['date']}. {hardware}; {versions}."
        args.markdown.write_text(f"{head}\n\n{call}\n\n{report.markdown()}\n")
