"""Command lines on which `--save-every` and `--save_every` are the same option."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.system.errors import InputError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose option names take hyphens or underscores and must not be abbreviated.

    renamed: former option names with the present ones. Raises InputError for a former name.
    """

    def __init__(self, *, renamed: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._renamed = renamed or {}

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse like argparse, after `hyphenated`; return unknown arguments as typed."""
        typed = sys.argv[1:] if args is None else args
        arguments = hyphenated(typed)
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        for name in (argument.partition("=")[0] for argument in options):
            if name in self._renamed:
                raise InputError(f"{name}: renamed to {self._renamed[name]}")
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
