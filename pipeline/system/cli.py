"""Command lines on which `--save-every` and `--save_every` are the same option."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose option names take hyphens or underscores and must not be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse like argparse, after `hyphenated`; return unknown arguments as typed."""
        typed = sys.argv[1:] if args is None else args
        arguments = hyphenated(typed)
        namespace, unknown = super().parse_known_args(arguments, namespace)
        as_typed = dict(zip(arguments, typed, strict=True))
        return namespace, [as_typed.get(argument, argument) for argument in unknown]


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with hyphens for underscores in option names, up to a lone `--`."""
    renamed: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*renamed, *arguments[position:]]
        name, assigned, value = argument.partition("=")
        renamed.append((name.replace("_", "-") if name.startswith("--") else name) + assigned + value)
    return renamed
