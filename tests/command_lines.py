"""Command lines held against the parsers that would read them; nothing is run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from engine.config import cli
from pipeline.system.errors import InputError
from tests.documents import PACKAGES, ROOT, Line, module_of

_RECIPE = str(ROOT / "engine" / "recipes" / "moco_v2_in1k.yaml")
_RUN = "engine/run.py"
LAUNCHERS = {"accelerate": launch_command_parser(), "torchrun": get_args_parser()}


class _Captured(BaseException):
    """What a module's command line is read by."""


@cache
def parser_of(module: str) -> tuple[argparse.ArgumentParser, bool]:
    """Return the parser of a module that is run as a command, and whether it hands on what it does not know."""

    def capture(passes_on: bool) -> Any:
        def read(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
            raise _Captured(parser, passes_on)

        return read

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it was imported before
        patch.setattr(argparse.ArgumentParser, "parse_args", capture(False))
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture(True))
        patch.setattr(sys, "argv", [module])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except _Captured as captured:
            parser, passes_on = captured.args
            return parser, passes_on
        finally:
            signal.signal(signal.SIGTERM, handler)
    raise AssertionError(f"{module} reads no command line")


def commands() -> list[str]:
    """Return the modules of the packages that are commands with a parser of their own."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    run = [path for path in files if '\nif __name__ == "__main__":' in path.read_text()]
    return [module_of(path) for path in run if path != ROOT / _RUN]


@cache
def launcher_commands() -> set[str]:
    """Return the commands that `./millrace help` lists."""
    shown = subprocess.run([ROOT / "millrace", "help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^  (\w+)", shown, re.MULTILINE))


def problems(line: Line) -> list[str]:
    """Return what is wrong with a command line."""
    first, *rest = line.words
    if first == "./millrace":
        return _launcher(rest, line.whole)
    if first in LAUNCHERS:
        return _launched(first, rest[first == "accelerate" :], line.whole)
    if first == "sbatch":
        at = next((i for i, word in enumerate(rest) if "/" in word), len(rest) - 1)
        return _missing(rest[at]) + settings(rest[at + 1 :])
    if first == "python" and rest[:1] == ["-m"]:
        return _module(rest[1], rest[2:], line.whole) if rest[1:] else ["no module"]
    script = rest if first == "python" else line.words
    return settings(script[1:]) if script[0] == _RUN else _missing(script[0])


def settings(words: Sequence[str]) -> list[str]:
    """Return what is wrong with a run's settings."""
    given: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--config":
            stands_for = "..." in word or _placeholder(Path(word).name)
            if not stands_for and (wrong := _missing(word)):
                return wrong
            given.append(_RECIPE if stands_for else str(ROOT / word))
        elif word != "...":
            given.append(word)
    return _parsed(tuple(given))


@cache
def _parsed(given: tuple[str, ...]) -> list[str]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.parse(given)
    except InputError as error:
        return [str(error)]
    except SystemExit as ended:  # of --help
        return [f"status {ended.code}"] if ended.code else []
    return []


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser and of its subcommands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*(options(inner) for inner in action.choices.values()))
    return found


def _placeholder(word: str) -> bool:
    return "..." in word or bool(re.fullmatch(r"[A-Z][A-Z0-9_]*(\.\w+)?", word))


def _missing(path: str) -> list[str]:
    return [] if (ROOT / path).exists() else [f"{path} does not exist"]


def _launcher(words: list[str], whole: bool) -> list[str]:
    name = words[0] if words else "help"
    if name not in launcher_commands():
        return [f"./millrace has no {name}"]
    module = {"demo": "engine.demo", "doctor": "pipeline.doctor"}.get(name)
    return _module(module, words[1:], whole) if module else []


def _launched(name: str, words: list[str], whole: bool) -> list[str]:
    walk = _Walk(LAUNCHERS[name], words, stops=True)
    if not walk.rest:
        return walk.found + (["nothing to launch"] if whole else [])
    script, *rest = walk.rest
    if walk.seen & {"module"}:
        return walk.found + _module(script, rest, whole)
    return walk.found + (settings(rest) if script == _RUN else [f"{script} is not {_RUN}"])


def _module(name: str, words: list[str], whole: bool) -> list[str]:
    try:
        known = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        known = False
    if not known:
        return [f"no module {name}"]
    if name == "pytest":
        return _pytest(words)
    if name.split(".")[0] not in PACKAGES:
        return [f"{name} takes no {word}" for word in words if name.startswith("tests.")]
    if name == "engine.run":
        return settings(words)
    parser, passes_on = parser_of(name)
    walk = _Walk(parser, words, passes_on=passes_on)
    found = walk.found + (walk.left_out() if whole else [])
    return found + (settings(walk.rest) if any(word != "..." for word in walk.rest) else [])


def _pytest(words: list[str]) -> list[str]:
    listed = (ROOT / "pyproject.toml").read_text().partition("\nmarkers = [\n")[2].partition("\n]")[0]
    marks = set(re.findall(r'^ *"(\w+):', listed, re.MULTILINE))
    chosen = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "-m"]
    asked = {name for expression in chosen for name in re.findall(r"\w+", expression)} - {"and", "or", "not"}
    paths = [wrong for word in words if "/" in word for wrong in _missing(word.split("::")[0])]
    return [f"no mark {name}" for name in sorted(asked - marks)] + paths


class _Walk:
    """Words met by a parser, one after another: what it does not know, what it hands on, what it was not given.

    stops: at the first word that is no option, which with all that follow is `rest`.
    """

    def __init__(
        self, parser: argparse.ArgumentParser, words: Sequence[str], *, passes_on: bool = False, stops: bool = False
    ) -> None:
        self.found: list[str] = []
        self.rest: list[str] = []
        self.seen: set[str] = set()
        self._parser, self._passes_on = parser, passes_on
        self._places = [action for action in parser._actions if not action.option_strings]
        words = list(words)
        while words:
            if words[0] == "...":
                words.pop(0)
            elif words[0].startswith("-"):
                self._option(words)
            elif stops:
                self.rest, words = words, []
            else:
                self._place(words)

    def _option(self, words: list[str]) -> None:
        name, assigned, value = words.pop(0).partition("=")
        values = [value] if assigned else []
        action = self._parser._option_string_actions.get(name)
        nargs = None if action is None else action.nargs
        most = 1 if nargs is None else nargs if isinstance(nargs, int) else 99
        while not assigned and len(values) < most and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if action is not None:
            self.seen.add(action.dest)
            self._check(action, values)
            if len(values) < (most if most < 99 else 1):
                self.found.append(f"{name} without its value")
        elif self._passes_on:
            self.rest += [name, *values]
        else:
            self.found.append(f"{self._parser.prog} has no option {name}")

    def _place(self, words: list[str]) -> None:
        word = words.pop(0)
        if not self._places:
            self.found.append(f"{self._parser.prog}: {word} is one too many")
            return
        action = self._places[0]
        self.seen.add(action.dest)
        if action.nargs not in ("+", "*"):
            self._places.pop(0)
        if isinstance(action, argparse._SubParsersAction) and word in action.choices:
            inner = _Walk(action.choices[word], words)
            self.found += inner.found
            self._left_out = inner.left_out()
            words.clear()
        else:
            self._check(action, [word])
            if isinstance(action, argparse._SubParsersAction):
                words.clear()

    def _check(self, action: argparse.Action, values: Sequence[str]) -> None:
        for value in [part for given in values for part in given.split("|")]:
            if _placeholder(value):
                continue
            if action.choices is not None and value not in action.choices:
                self.found.append(f"{action.dest} {value}: choose of {', '.join(action.choices)}")
            elif action.type in (int, float):
                try:
                    action.type(value)
                except ValueError:
                    self.found.append(f"{action.dest} {value}: no number")

    _left_out: Sequence[str] = ()

    def left_out(self) -> list[str]:
        """Return what the parser requires and was not given."""
        actions = [action for action in self._parser._actions if action.required and action.dest not in self.seen]
        return [f"{self._parser.prog}: {action.dest} is left out" for action in actions] + list(self._left_out)
