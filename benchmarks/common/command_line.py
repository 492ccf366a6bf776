"""Command-line options shared by the benchmarks."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from pipeline.system.cli import ArgumentParser
from pipeline.system.errors import InputError


def benchmark_parser(module: str, description: str, renamed: Mapping[str, str] | None = None) -> ArgumentParser:
    """Return the parser of a benchmark's module, with options for the result's files. renamed: as for its class."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{module}", description=description, renamed=renamed)
    files = parser.add_argument_group("result files")
    files.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    files.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here")
    return parser


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError for the first of these options that is below 1."""
    for name in names:
        if (value := getattr(args, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: give 1 or more")


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Return the numbers of an option such as `1,2,4`. Raises InputError for others, and for numbers below `least`."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InputError(f"{option} {text}: give numbers from {least}, such as 1,2,4")
    return [int(part) for part in parts]


def yaml_file(name: str, folder: Path, kind: str) -> Path:
    """Return the folder's file NAME.yaml, or `name` itself if it is a path. Raises InputError if there is none."""
    path = folder / f"{name}.yaml" if "/" not in name and not name.endswith(".yaml") else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise InputError(f"{name}: no such {kind}: choose one of {known}, or give the path of a file like them")
    return path
