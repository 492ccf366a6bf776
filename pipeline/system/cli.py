"""Command lines whose option names take hyphens or underscores, with errors of one line."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from pipeline.system.errors import InputError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose option names take hyphens or underscores and must not be abbreviated.

    renamed: former option names with the present ones. Raises InputError for a former name. Other errors are one line,
    with exit code 2.
    """

    def __init__(self, *, renamed: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._renamed = renamed or {}
        self._unknown: list[str] = []

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
        self._unknown = [as_typed.get(argument, argument) for argument in unknown]
        return namespace, self._unknown

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse like argparse. An unknown argument is an error that suggests the nearest option."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:  # a command's: argparse leaves them to the top-level parser
            commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
            parser = next((one for choices in commands for one in choices.values() if one._unknown), self)
            name = unknown[0].partition("=")[0]
            kind = "option" if name.startswith("-") else "argument"
            parser.error(f"{name}: no such {kind}{_nearest(name, parser._option_string_actions)}")
        return namespace

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not among the action's choices, and suggest the nearest one."""
        if action.choices is not None and value not in action.choices:
            option, names = argparse.ArgumentError(action, "").argument_name, [*map(str, action.choices)]
            self.error(f"{option} {value!r}{_nearest(str(value), names)}: choose one of {', '.join(names)}")

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and a line: the error, and where to read on."""
        self.exit(2, f"error: {message}: see {self.prog} --help\n")


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]}" if close else ""


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with hyphens for underscores in option names, up to a lone `--`."""
    renamed: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*renamed, *arguments[position:]]
        name, assigned, value = argument.partition("=")
        renamed.append((name.replace("_", "-") if name.startswith("--") else name) + assigned + value)
    return renamed
