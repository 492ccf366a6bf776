"""What a benchmark ran on, and how its figures are shown and written down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline.system.cores import available_cores
from pipeline.system.errors import InputError
from pipeline.system.packages import version

PACKAGES = ("torch", "ffcv", "numba", "numpy", "pillow", "accelerate", "nvidia-dali-cuda130", "lightly")


def describe() -> dict[str, Any]:
    """Return processor, cores, GPU, versions and date."""
    versions = {package: version(package) or "none" for package in PACKAGES}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "processor": _processor(),
        "cores": available_cores(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **versions},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def numbers(given: str, option: str, least: int = 1) -> list[int]:
    """Return the numbers of an option such as `1,2,4`. Raises InputError for what is none, or below `least`."""
    parts = given.split(",")
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InputError(f"{option} {given}: give numbers from {least}, such as 1,2,4")
    return [int(part) for part in parts]


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": float(np.median(values)), "min": float(min(values)), "max": float(max(values))}


def texts(spread: dict[str, float], form: str, times: float = 1.0) -> list[str]:
    """Return a spread's median, minimum and maximum, each times that factor, as text."""
    return [form.format(times * spread[kind]) for kind in ("median", "min", "max")]


def told(spread: dict[str, float], form: str, times: float = 1.0) -> str:
    """Return a spread as `median (least-most)`, each times that factor."""
    return "{} ({}-{})".format(*texts(spread, form, times))


@dataclass
class Report:
    """A table and what is to be said of it. The first column names the rows, and is set left as words are."""

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


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the result goes besides the terminal."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here")


def tell(report: Report, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a report with what its result says of the machine; write both where `args` of `add_outputs` say."""
    about = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number != "none")
    where = f"{about['processor']}, {about['cores']} cores, load {about['load']}, {about['gpu'] or 'no GPU'}"
    print(f"{where}\n{about['date']}, {versions}")
    Console(width=160).print(report.table())
    for note in report.notes:
        print(note)
    write(result, args.json)
    if args.markdown is not None:
        module = getattr(sys.modules["__main__"].__spec__, "name", "")
        call = f"    python -m {module} {shlex.join(sys.argv[1:])}"
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        about_it = f"{about['date']}. {where}; {versions}."
        args.markdown.write_text(f"# {report.title}\n\n{about_it}\n\n{call}\n\n{report.markdown()}\n")


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write `result` as JSON to `path`, where one is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
