"""The command line and recipes: read into settings, or refused in one line that says what to write instead."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from engine.config import Settings
from methods.registry import Terms
from pipeline.errors import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _load_recipe(text: str) -> Any:
    """Return what YAML `text` says; terms may be a list of names, or of names with their parameters, or nothing."""
    found = yaml.safe_load(text)
    if isinstance(found, dict) and found.get("precision") is False:
        found["precision"] = "no"  # which YAML takes for false
    if not isinstance(found, dict) or "terms" not in found:
        return found
    terms = found["terms"] or {}
    terms = [terms] if isinstance(terms, str) else terms
    if isinstance(terms, list):
        terms = {name: value for item in terms for name, value in _pairs(item)}
    return found | {"terms": terms}


_NAMES = ", ".join(term.name for term in fields(Terms))


def _pairs(item: Any) -> list[tuple[Any, Any]]:
    return list(item.items()) if isinstance(item, dict) else [(item, {})]


def _check_recipe(path: str) -> None:
    """Raise InputError for a section or a term that there is not: the parser passes over an empty one."""
    try:
        found = _load_recipe(Path(path).read_text())
    except OSError:
        return  # the parser says what is wrong
    except (ValueError, TypeError, yaml.YAMLError) as error:
        detail = " ".join(str(error).replace("<unicode string>", path).split())
        raise InputError(f"--config {path}: not valid YAML: {detail}: correct it there") from None
    if not isinstance(found, dict):
        raise InputError(f"--config {path}: not a mapping of settings: write lines such as optim: {{lr: 0.03}}")
    for within, given, known in (("", found, Settings), ("terms.", found.get("terms"), Terms)):
        names = [part.name for part in fields(known)]
        for name in given if isinstance(given, dict) else ():
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f", did you mean {within}{close[0]}" if close else ""
                choice = f"choose of {_NAMES}" if within else "see --help for all of them"
                raise InputError(f"{within}{name}: no such setting{hint}: {choice}")


jsonargparse.set_loader("recipe", _load_recipe, exceptions=(yaml.YAMLError,))


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
        "--dry-run", action="store_true", help="build, take a step on a stub batch, print its size, and exit"
    )
    parser.add_class_arguments(Settings)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line (`sys.argv` by default). Raises InputError, naming key and remedy."""
    parser = _parser()
    ordered = _recipe_first(arguments)
    if ordered and ordered[0].startswith("--config"):
        _check_recipe(ordered[0].partition("=")[2] or "".join(ordered[1:2]))
    try:
        chosen = parser.instantiate(parser.parse_args(ordered)).as_dict()
    except ArgumentError as error:
        raise InputError(_explain(parser, str(error))) from None
    chosen.pop("config", None)
    chosen.pop("dry_run", None)
    return Settings(**chosen)


_OWN = ("data.train", "data.eval", "data.workers", "data.ahead", "data.stall_timeout")


def shared(settings: Settings) -> dict[str, Any]:
    """Return the settings by their dotted names that have to be the same on all processes."""
    return {key: value for key, value in flat(settings.as_dict()).items() if key not in _OWN}


def flat(settings: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{within}{key}.") if isinstance(value, dict) else {within + key: value}
    return found


def wants_dry_run(arguments: Sequence[str] | None = None) -> bool:
    """Return whether a command line asks for a dry run."""
    return "--dry-run" in (sys.argv[1:] if arguments is None else arguments)


def _recipe_first(arguments: Sequence[str] | None) -> list[str]:
    """Return the arguments with --config before all others, so that these win over the recipe wherever they stand."""
    rest = [part for argument in _spelled(arguments) for part in argument]
    first: list[str] = []
    for number, argument in enumerate(rest):
        if argument == "--config" or argument.startswith("--config="):
            length = 2 if argument == "--config" else 1
            first, rest = rest[number : number + length], rest[:number] + rest[number + length :]
            break
    return first + rest


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
