"""Command lines checked by the parsers that read them; nothing runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from engine.config import cli
from pipeline.system.errors import InputError
from tests.documents import PACKAGES, ROOT, Line, module_of

_RECIPE = str(ROOT / "engine" / "recipes" / "moco_v2_in1k.yaml")
_RUN = "engine/run.py"
LAUNCHERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "accelerate": launch_command_parser,
    "torchrun": get_args_parser,
}


class _Rejected(Exception):
    """A parser's error message."""


def _file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser of a command of this project."""
    path = _file_of(module)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return importlib.import_module(name).parser()


def commands() -> list[str]:
    """Return the modules that are commands with a parser of their own."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    run = [path for path in files if '\nif __name__ == "__main__":' in path.read_text()]
    return [module_of(path) for path in run if path != ROOT / _RUN]


@cache
def _launcher_commands() -> set[str]:
    """Return the commands that `./millrace help` lists."""
    output = subprocess.run([ROOT / "millrace", "help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^  (\w+)", output, re.MULTILINE))


def problems(line: Line) -> list[str]:
    """Return the errors of a command line."""
    first, *rest = line.words
    try:
        if first == "./millrace":
            return _launcher(rest, line.complete)
        if first in LAUNCHERS:
            return _launched(first, rest[first == "accelerate" :], line.complete)
        if first == "sbatch":
            script = next((i for i, word in enumerate(rest) if "/" in word), len(rest) - 1)
            return _missing(rest[script]) + settings(rest[script + 1 :])
        if first == "python" and rest[:1] == ["-m"]:
            return _module(rest[1], rest[2:], line.complete) if rest[1:] else ["no module"]
        script, *words = rest if first == "python" else line.words
        return settings(words) if script == _RUN else _missing(script)
    except _Rejected as error:
        return [str(error)]


def settings(words: Sequence[str]) -> list[str]:
    """Return the errors of a run's settings."""
    known: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--config":
            placeholder = "..." in word or _placeholder(Path(word).name)
            if not placeholder and (missing := _missing(word)):
                return missing
            known.append(_RECIPE if placeholder else str(ROOT / word))
        elif word != "...":
            known.append(word)
    return _parse_settings(tuple(known))


@cache
def _parse_settings(words: tuple[str, ...]) -> list[str]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.parse(words)
    except InputError as error:
        return [str(error)]
    except SystemExit as exit_:  # of --help
        return [f"status {exit_.code}"] if exit_.code else []
    return []


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser and of its subcommands."""
    names = set(parser._option_string_actions)
    for subparser in _subparsers(parser):
        names |= options(subparser)
    return names


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [subparser for action in actions for subparser in action.choices.values()]


def _placeholder(word: str) -> bool:
    return "..." in word or bool(re.fullmatch(r"[A-Z][A-Z0-9_]*(\.\w+)?", word))


def _missing(path: str) -> list[str]:
    return [] if (ROOT / path).exists() else [f"{path} does not exist"]


def _launcher(words: list[str], complete: bool) -> list[str]:
    words = words[1:] if words[:1] == ["--system"] else words
    name = words[0] if words else "help"
    if name not in _launcher_commands():
        return [f"./millrace has no {name}"]
    module = {"demo": "engine.demo", "doctor": "pipeline.doctor"}.get(name)
    return _module(module, words[1:], complete) if module else []


def _launched(name: str, words: list[str], complete: bool) -> list[str]:
    arguments, unknown = _parse(name, words, complete)
    if unknown:
        return [f"{name} has no option {unknown[0]}"]
    script, rest = arguments.training_script, arguments.training_script_args
    if script is None:
        return []
    if arguments.module:
        return _module(script, rest, complete)
    return settings(rest) if script == _RUN else [f"{script} is not {_RUN}"]


def _module(name: str, words: list[str], complete: bool) -> list[str]:
    try:
        exists = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        exists = False
    if not exists:
        return [f"no module {name}"]
    if name == "pytest":
        return _pytest(words)
    if name.split(".")[0] not in PACKAGES:
        return [f"{name} takes no {word}" for word in words if name.startswith("tests.")]
    if name == "engine.run":
        return settings(words)
    _, unknown = _parse(name, words, complete)
    if not unknown:
        return []
    # other words are the settings of a run
    passes_on = "parse_known_args(" in _file_of(name).read_text()
    return settings(unknown) if passes_on else [f"{name} has no option {unknown[0]}"]


def _pytest(words: list[str]) -> list[str]:
    listed = (ROOT / "pyproject.toml").read_text().partition("\nmarkers = [\n")[2].partition("\n]")[0]
    marks = set(re.findall(r'^ *"(\w+):', listed, re.MULTILINE))
    expressions = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "-m"]
    used = {name for expression in expressions for name in re.findall(r"\w+", expression)} - {"and", "or", "not"}
    paths = [wrong for word in words if "/" in word for wrong in _missing(word.split("::")[0])]
    return [f"no mark {name}" for name in sorted(used - marks)] + paths


def _parse(name: str, words: Sequence[str], complete: bool) -> tuple[argparse.Namespace, list[str]]:
    """Parse words with placeholders; return the arguments, and the unknown words. `...` is a value after an option."""
    pairs = zip(["", *words], words, strict=False)
    known = [word for before, word in pairs if word != "..." or before.startswith("--")]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            arguments, unknown = _lenient_parser(name, complete).parse_known_args(known)
        except SystemExit:  # of --help
            return argparse.Namespace(training_script=None), []
    return arguments, [word for word in unknown if word != "..."]


@cache
def _lenient_parser(name: str, complete: bool) -> argparse.ArgumentParser:
    """Return a parser that takes placeholders for values and, unless `complete`, requires nothing."""
    parser = LAUNCHERS[name]() if name in LAUNCHERS else parser_of(name)
    _relax(parser, complete)
    return parser


def _relax(parser: argparse.ArgumentParser, complete: bool) -> None:
    def error(message: str) -> NoReturn:
        raise _Rejected(f"{parser.prog}: {message}")

    parser.error, parser.allow_abbrev = error, False  # type: ignore[method-assign]
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            action.type, action.choices = _lenient_type(action), None
        action.required = action.required and complete
    for subparser in _subparsers(parser):
        _relax(subparser, complete)


def _lenient_type(action: argparse.Action) -> Callable[[str], str]:
    convert, choices = action.type or str, action.choices
    assert callable(convert)

    def check(value: str) -> str:
        for part in value.split("|"):
            if not _placeholder(part) and choices is not None and convert(part) not in choices:
                raise argparse.ArgumentTypeError(f"invalid choice: {part!r}")
            if not _placeholder(part):
                convert(part)
        return value

    return check
