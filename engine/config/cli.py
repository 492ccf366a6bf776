"""The command line and recipes: read into settings, or refused in one line that says what to write instead."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from engine.config.renamed import RENAMED, refuse_former, translate
from engine.config.settings import LONGEST, Settings
from methods.registry import Terms
from pipeline.system.errors import InputError
from pipeline.system.limits import parse_yaml, read_yaml

logger = logging.getLogger(__name__)
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _names(kind: Any) -> list[str]:
    return [part.name for part in fields(kind)]


_EXAMPLE, _HELP = "engine/recipes/moco_v2_in1k.yaml", "see --help for all of them"
_NAMES = ", ".join(_names(Terms))
_SECTIONS = {part.name: _names(part.default_factory) for part in fields(Settings) if is_dataclass(part.default_factory)}
_PARAMETERS = {term: _names(next(filter(is_dataclass, get_args(kind)))) for term, kind in get_type_hints(Terms).items()}


def _read_recipe(path: str) -> dict[str, Any]:
    """Return the settings of a recipe. Terms may be a list of names, or of names with their parameters, or nothing.

    Raises InputError for what there is not. The parser must see no mapping but those of settings: it would import
    whatever class another one names.
    """
    found = read_yaml(path, f"give a recipe, such as {_EXAMPLE}, or correct it")
    if not isinstance(found, dict):
        raise InputError(f"--config {path}: not a mapping of settings: write lines such as optim: {{lr: 0.03}}")
    former = [key for key in RENAMED if _has(found, key)]
    if len(former) == len(RENAMED):  # complete: a run of an earlier version wrote it
        if os.environ.get("RANK", "0") == "0":
            listed = ", ".join(f"{key} -> {RENAMED[key]}" for key in former)
            logger.warning("%s: of an earlier version: settings renamed: %s", path, listed)
        found = translate(found)
    if found.get("precision") is False:
        found["precision"] = "no"  # which YAML takes for false
    if "terms" in found:
        found["terms"] = _terms(found["terms"])
    _check_names(found, "", _names(Settings))
    for section, known in _SECTIONS.items():
        given = found.get(section) or {}
        if not isinstance(given, dict):
            raise InputError(f"{section} {given!r}: a section: write lines such as optim: {{lr: 0.03}}")
        _check_names(given, f"{section}.", known, f"choose of {_NAMES}" if section == "terms" else _HELP)
    for term, given in (found.get("terms") or {}).items():
        _check_term(term, given)
    _check_sizes(found)
    return {name: given for name, given in found.items() if given is not None or name not in _SECTIONS}


def _has(settings: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    within = settings.get(section) if section else settings
    return isinstance(within, dict) and name in within


def _terms(given: Any) -> Any:
    """Return terms as a mapping, however a recipe lists them."""
    given = [given] if isinstance(given, str) else given or {}
    if not isinstance(given, list):
        return given
    pairs = [pair for item in given for pair in (item.items() if isinstance(item, dict) else [(str(item), {})])]
    return dict(pairs)


def _check_names(given: dict[Any, Any], within: str, known: list[str], choice: str = _HELP) -> None:
    """Raise InputError for a name that is none of the known ones."""
    for name in given:
        refuse_former(f"{within}{name}", given[name])
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {within}{close[0]}" if close else ""
            raise InputError(f"{within}{name}: no such setting{hint}: {choice}")


def _check_sizes(given: Any) -> None:
    """Raise InputError for a text or number too long: the parser takes texts for YAML, with a reader without bounds."""
    if isinstance(given, dict | list):
        for value in given.values() if isinstance(given, dict) else given:
            _check_sizes(value)
    elif isinstance(given, int) and abs(given) > 2**53:
        raise InputError("a number of more than 15 digits: give a smaller one")
    elif isinstance(given, str) and len(given) > LONGEST:
        raise InputError(f"{given[:40]!r} ...: {len(given)} characters: give at most {LONGEST}")


def _check_term(term: str, given: Any) -> None:
    """Raise InputError for what are no parameters of a term."""
    if given is not None and not isinstance(given, dict):
        raise InputError(f"terms.{term} {given!r}: wrong type or value: give parameters such as {{weight: 1}}, or null")
    _check_names(given or {}, f"terms.{term}.", _PARAMETERS[term], f"see --terms.{term}.help for all of them")


jsonargparse.set_loader("recipe", parse_yaml, exceptions=(yaml.YAMLError, ValueError))


@functools.cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        parser_mode="recipe",
        prog="accelerate launch engine/run.py",
        description="Pretrain an image encoder by momentum contrast. Every field below can stand in the --config file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="recipe, such as engine/recipes/moco_v2_in1k.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="build, take a step on stub batches, print its size, and exit"
    )
    parser.add_class_arguments(Settings)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line (`sys.argv` by default). Raises InputError, naming key and remedy."""
    parser = _parser()
    recipes, rest = _without_recipes(arguments)
    read = [f"--config={yaml.safe_dump(_read_recipe(path))}" for path in recipes]
    try:
        chosen = parser.instantiate(parser.parse_args(read + rest)).as_dict()
    except ArgumentError as error:
        raise InputError(_explain(parser, str(error))) from None
    except (OverflowError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"a number beyond all measure ({error}): give a smaller one") from None
    chosen.pop("config", None)
    chosen.pop("dry_run", None)
    return Settings(**chosen)


_OWN = ("data.train", "data.eval", "data.workers", "data.prefetch_factor", "data.stall_timeout")


def shared(settings: Settings) -> dict[str, Any]:
    """Return the settings by their dotted names that have to be the same on all processes."""
    return {key: value for key, value in flat(settings.as_dict()).items() if key not in _OWN}


def flat(settings: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{within}{key}.") if isinstance(value, dict) else {within + key: value}
    return found


def wants_dry_run() -> bool:
    """Return whether the command line asks for a dry run."""
    return "--dry-run" in sys.argv[1:]


def _without_recipes(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the paths that --config names, and the other arguments, which win over them wherever they stand."""
    recipes, rest = [], []
    given = (part for argument in _spelled(arguments) for part in argument)
    for argument in given:
        name, assigned, value = argument.partition("=")
        if name == "--config":
            recipes.append(value if assigned else next(given, ""))
        else:
            rest.append(argument)
    _check_arguments(rest)
    return recipes, rest


def _check_arguments(given: list[str]) -> None:
    """Raise InputError for what the parser would take for a file to read or a class to import."""
    _check_sizes(given)
    for argument, following in zip(given, [*given[1:], ""], strict=False):
        name, assigned, value = argument.partition("=")
        refuse_former(name.removeprefix("--").replace("-", "_"), value if assigned else following)
        section, _, field = name.removeprefix("--").rstrip("+").partition(".")
        term, _, parameter = field.partition(".")
        if not name.startswith("--") or section not in _SECTIONS:
            continue
        if not field:
            raise InputError(f"{section}: a section: give its settings by themselves, see --help for all of them")
        if section == "terms" and term in _PARAMETERS and parameter != "help":
            _check_term(term, {parameter: None} if parameter else _plain(value if assigned else following))


def _plain(value: str) -> Any:
    """Return what a value says, or the value where it is no YAML."""
    try:
        return parse_yaml(value)
    except (yaml.YAMLError, ValueError):
        return value


def _spelled(arguments: Sequence[str] | None) -> Iterator[list[str]]:
    """Yield the arguments; `--terms [a, b]` as `--terms.a {} --terms.b {}`, and null for all other terms.

    And `--allow-change KEY` as one more key of that list.
    """
    given = iter(sys.argv[1:] if arguments is None else arguments)
    for argument in given:
        name, assigned, value = argument.partition("=")
        if name in ("--allow-change", "--allow_change"):
            value = value if assigned else next(given, "")
            yield ["--allow_change" if value.startswith("[") else "--allow_change+", value]
            continue
        if name != "--terms":
            yield [argument]
            continue
        value = value if assigned else next(given, "")
        while value.startswith("[") and not value.endswith("]"):  # the shell cut a list that was not quoted
            value += "," + next(given, "]")
        names = [] if value == "null" else re.findall(r"\w+", value)
        unknown = [name for name in names if name not in _NAMES.split(", ")]
        if unknown or value.startswith("{"):
            raise InputError(
                f"terms {value!r}: give names as in [co2, residual], of {_NAMES}; parameters go by themselves"
            )
        yield from ([f"--terms.{name}", "{}"] for name in names)
        yield from ([f"--terms.{term.name}", "null"] for term in fields(Terms) if term.name not in names)


def _explain(parser: ArgumentParser, message: str) -> str:
    """Return jsonargparse's message in one line, with the remedy."""
    flat = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --?([\w.-]+)", flat)
    nested = re.search(r"Group '([\w.]*)' does not accept option '([\w.]+)'", flat)
    found = unknown or nested
    if found:
        name = ".".join(part for part in found.groups() if part)
        return f"{name}: no such setting{_suggestion(parser, name)}: see --help for all of them"
    union = re.match(
        r'Parser key "([\w.]+)": Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] E', flat
    )
    if union and "Problem with" not in flat:
        value = flat.rpartition("Given value: ")[2]
        wanted = "parameters such as {weight: 1}" if union[1].startswith("terms.") else _kinds(union[2])
        return f"{union[1]} {value!r}: wrong type or value: give {wanted}, or null"
    term = re.match(r'Parser key "(terms\.\w+)"', flat)
    within = f"{term.group(1)}." if term else ""
    foreign = re.search(r"Option '([\w.]+)' is not accepted", flat)
    if foreign:
        name = within + foreign.group(1)
        where = f"--{within}help" if within else "--help"
        return f"{name}: no such setting: see {where} for all of them"
    wrong = re.search(r'Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*?)(?: - Expected a|$)', flat)
    if wrong:
        key, kind, value = within + wrong.group(1), wrong.group(2), wrong.group(3)
        choices = re.search(r"Literal\[(.*)\]", kind)
        if choices:
            return f"{key} {value!r}: choose one of {choices.group(1)}"
        return f"{key} {value!r}: wrong type: give {_wanted(kind)}"
    missing = re.search(r'Parser key "config": (.*)', flat)
    if missing:
        return f"--config: {missing.group(1)}: give the path of a recipe, such as engine/recipes/moco_v2_in1k.yaml"
    if flat.startswith("Problems parsing config"):
        return f"--config: not valid YAML: {flat.partition(': ')[2]}: correct it there"
    return f"{flat}: see --help"


def _suggestion(parser: ArgumentParser, name: str) -> str:
    if name == "dry_run":
        return ", did you mean --dry-run"
    name = name.replace("-", "_")
    known = [action.dest for action in parser._actions if action.dest not in ("dry_run", "help")]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # the right field in the wrong section
        close = [key for key in known if key.split(".")[-1] == name.split(".")[-1]][:1]
    return f", did you mean {close[0]}" if close else ""


def _wanted(kind: str) -> str:
    """Return a type, as jsonargparse prints it, as what to give."""
    words = {"bool": "true or false", "list": "a list such as [160, 224]"}
    name = _type_name(kind).removeprefix("typing.").split("[")[0].lower()
    return words.get(name, f"a value of type {_type_name(kind)}")


def _kinds(text: str) -> str:
    """Return the types of a union, as jsonargparse prints them, in words."""
    words = {"float": "a number", "int": "a whole number", "bool": "true or false"}
    names = [_type_name(kind) for kind in re.findall(r"<class '[^']+'>|Literal\[.*?\]", text)]
    readable = [words.get(name, name.replace("Literal[", "one of ").rstrip("]")) for name in names]
    return " or ".join(word for word in readable if word != "NoneType")


def _type_name(text: str) -> str:
    return text.replace("<class '", "").replace("'>", "").replace("typing.", "")
