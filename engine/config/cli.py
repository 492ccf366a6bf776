"""Command line and recipes, read into settings. An error is one line with its remedy."""

import json
import logging
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from engine.config.renamed import RENAMED, former, translate
from engine.config.setting_error import SettingError
from engine.config.settings import Settings
from engine.config.validation import explain, rules, shown, unknown
from methods.custom import needs_trust
from pipeline.system.errors import InputError
from pipeline.system.limits import parse_yaml, read_yaml

logger = logging.getLogger(__name__)
_SETTINGS = TypeAdapter(Settings)
_RULES = rules(Settings)
_TERMS = list(_RULES["terms"]["properties"])
_EXAMPLE = "engine/recipes/moco_v2_in1k.yaml"
_METAVARS = {"boolean": "true|false", "integer": "N", "number": "X", "string": "TEXT", "array": "LIST", "object": "{}"}
_HELP = f"""usage: python engine/run.py [--config RECIPE] [--SETTING VALUE ...]
       accelerate launch engine/run.py ...   (several GPUs)

Pretrain an image encoder by momentum contrast. A recipe is a YAML file of the
settings below. Options override recipes, and later recipes earlier ones.
--compile means --compile true, and --no-compile means --compile false.

  --config RECIPE
      Recipe, such as {_EXAMPLE}.
  --dry-run
      Build, take a step on stub batches, print sizes, and exit.
  --print-config
      Print all settings, as YAML, and exit.
  --trust-recipe
      Import the code that a recipe's model.arch names.
  --terms [NAME, ...]
      Use these terms, of {", ".join(_TERMS)}, and no others.
      --terms.NAME.help lists the parameters of one."""
_EXPONENT = r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"  # a number to Python, but text to YAML
_FLAGS = ("dry_run", "print_config", "trust_recipe")
_PER_RANK = ("data.train", "data.eval", "knn.bank", "data.workers", "data.prefetch_factor", "data.stall_timeout")
_MAX_CHARACTERS, _MAX_VALUES = 4096, 1000  # of a path, of a list
_MAX_INTEGER = 2**53  # exact as a float


class CommandLine(NamedTuple):
    """Contents of a command line."""

    settings: Settings
    dry_run: bool


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line; see `parse_command_line`."""
    return parse_command_line(arguments).settings


def parse_command_line(arguments: Sequence[str] | None = None) -> CommandLine:
    """Return the contents of a command line (`sys.argv` by default). Raises InputError, naming key and remedy."""
    options = _read_options(sys.argv[1:] if arguments is None else arguments)
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, value in options:
        if key == "config":
            paths: dict[str, str] = {}
            _merge(settings, _read_recipe(value, paths))
            sources |= paths
    for key, value in options:
        if key == "allow_change":
            value = [*(settings.get(key) or []), *value]
        if key in _RULES:
            for name in reversed(key.split(".")):
                value = {name: value}
            _merge(settings, _typed("", value))
            sources.pop(key, None)
    try:  # JSON: pydantic's strict mode takes no dict for a dataclass
        parsed = _SETTINGS.validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        wrong = explain(error, Settings)
        raise wrong.in_recipe(sources.get(wrong.key, "")) from None
    _check_trust(parsed, sources, ("trust_recipe", True) in options)
    if ("print_config", True) in options:
        print(yaml.safe_dump(parsed.as_dict(), sort_keys=False), end="")
        sys.exit()
    return CommandLine(parsed, ("dry_run", True) in options)


def _check_trust(settings: Settings, sources: dict[str, str], trusted: bool) -> None:
    """Raise InputError where a recipe names a backbone that imports code or reads files, unless it is trusted."""
    model = settings.model
    recipe = next((sources[key] for key in ("model.arch", "model.args") if key in sources), "")
    if recipe and needs_trust(model.arch, model.args) and not trusted:
        args = f" {model.args}" if model.args else ""
        remedy = "read it, then add --trust-recipe"
        raise InputError(f"model.arch {model.arch!r}{args} in {recipe}: would import code or read files: {remedy}")


def shared(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be equal on all ranks, by dotted name."""
    return {key: value for key, value in flat(settings.as_dict()).items() if key not in _PER_RANK}


def flat(settings: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    named: dict[str, Any] = {}
    for key, value in settings.items():
        named |= flat(value, f"{within}{key}.") if isinstance(value, dict) else {within + key: value}
    return named


def _read_recipe(
    path: str | Path, sources: dict[str, str], remedy: str = "", variants: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the nested settings of a recipe, merged into those of its `base`. Raises InputError.

    sources: receives the path of the file that sets a setting or section, by dotted name. variants: the recipes with
    this one as their base.
    """
    recipe = read_yaml(path, remedy or f"give a recipe, such as {_EXAMPLE}, or correct it")
    if not isinstance(recipe, dict):
        raise InputError(f"--config {path}: not a mapping of settings: write lines such as optim: {{lr: 0.03}}")
    try:
        recipe = _typed("", recipe)
    except SettingError as error:
        raise error.in_recipe(str(path)) from None
    if RENAMED.keys() <= flat(recipe).keys():  # complete: written by a run, not by hand
        if os.environ.get("RANK", "0") == "0":
            renamed = ", ".join(f"{old} is {new}" for old, new in RENAMED.items())
            logger.warning("%s: a run of an earlier version: settings renamed: %s", path, renamed)
        recipe = translate(recipe)
    if recipe.get("precision") is False:
        recipe["precision"] = "no"  # false to YAML
    if isinstance(terms := recipe.get("terms"), str | list):  # names, or names with parameters: no other terms
        terms = [terms] if isinstance(terms, str) else terms
        listed = [term if isinstance(term, dict) else {str(term): {}} for term in terms]
        recipe["terms"] = dict.fromkeys(_TERMS) | {name: values for term in listed for name, values in term.items()}
    base = recipe.pop("base", None)
    for key in _names(recipe):
        sources.setdefault(key, str(path))
    if base is None:
        return recipe
    if not isinstance(base, str):
        raise InputError(f"{path}: base {shown(base)}: give the path of a recipe, relative to this one")
    file, variants = Path(path).parent / base, (*variants, os.path.realpath(path))
    if os.path.realpath(file) in variants:
        raise InputError(f"{path}: base {base}: is a variant of this recipe: remove one of the two bases")
    settings = _read_recipe(file, sources, f"correct base in {path}", variants)
    _merge(settings, recipe)
    return settings


def _names(settings: dict[str, Any], within: str = "") -> Iterator[str]:
    """Return the dotted names of nested settings and sections."""
    for key, value in settings.items():
        yield within + key
        if isinstance(value, dict):
            yield from _names(value, f"{within}{key}.")


def _merge(settings: dict[str, Any], changes: dict[str, Any], within: str = "") -> None:
    """Set the values of `changes` in `settings`, section by section; a setting that is a mapping, as a whole."""
    for key, value in changes.items():
        section = _is_section(_RULES.get(within + key, {}))
        if not section or not isinstance(value, dict) or settings.get(key) is None:
            settings[key] = value
        elif isinstance(settings[key], dict):  # else a wrong value, for the validation to refuse
            _merge(settings[key], value, f"{within}{key}.")


def _typed(key: str, value: Any) -> Any:
    """Return the value of a setting or section, with text as the number, boolean, list or null that it says.

    Raises SettingError for a value that no setting can have.
    """
    rule = _RULES.get(key, {"type": "string", "null": False})
    if isinstance(value, str) and (rule["type"] != "string" or (rule["null"] and value == "null")):
        value = _plain(value)
    if isinstance(value, str) and key.startswith("model.args.") and re.fullmatch(_EXPONENT, value):
        value = float(value)
    if value is None and _is_section(rule) and not rule["null"]:
        return {}  # an empty section
    if isinstance(value, dict):
        return {str(name): _typed(f"{key}.{name}".lstrip("."), inner) for name, inner in value.items()}
    if isinstance(value, list):
        if len(value) > _MAX_VALUES:
            raise SettingError(key, "", f"{len(value)} values: give at most {_MAX_VALUES}")
        return [_typed(key, item) for item in value]
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise SettingError(key, "", "a number of more than 15 digits: give a smaller one")
    if isinstance(value, str):
        controls = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value)
        if controls or len(value) > _MAX_CHARACTERS:
            remedy = f"give at most {_MAX_CHARACTERS} characters, and no control characters"
            raise SettingError(key, repr(value[:40]), remedy)
    return value


def _is_section(rule: dict[str, Any]) -> bool:
    """Return whether this is the rule of a section or term, not of a setting."""
    return "properties" in rule


def _plain(text: str) -> Any:
    """Return the YAML value of a text, or its number in a form that YAML does not know, such as 1e-3; else the text."""
    try:
        value = parse_yaml(text)
        return float(value) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError):
        return text


def _read_options(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the options of a command line, by name, with underscores, and value. Raises InputError; exits for help."""
    words, options = list(arguments), []
    while words:
        option, assigned, text = words.pop(0).partition("=")
        key = option.lstrip("-").replace("-", "_")
        if key in ("h", "help") or (key.endswith(".help") and key.removesuffix(".help") in _RULES):
            print(_help(key.rpartition(".")[0]))
            sys.exit()
        positive = re.sub(r"(^|\.)no_", r"\1", key, count=1)
        switch = _RULES.get(positive, {}).get("type") == "boolean"
        if not assigned and (key in _FLAGS or (positive != key and switch)):
            options.append((positive, key in _FLAGS))
            continue
        if positive != key and positive in _RULES:
            remedy = f"give {option} without a value, or --" if switch else "no such option: give --"
            example = "true" if switch else "null" if _RULES[positive]["null"] else "VALUE"
            raise InputError(f"{option}: {remedy}{positive.replace('_', '-')} {example}")
        rule = {"type": "string"} if key == "config" else _RULES.get(key)
        if rule is None or not option.startswith("--"):
            raise former(key, text or "".join(words[:1])) or unknown(key, _RULES, option.lstrip("-"))
        if _is_section(rule) and not (rule["null"] or key == "terms"):
            raise InputError(f"{key}: a section: give its settings one by one, see --help for all of them")
        values, several = [text] * bool(assigned), rule["type"] in ("array", "object")  # which the shell may cut
        while words and not words[0].startswith("--") and (several or not values):
            values.append(words.pop(0))
        if not values and rule["type"] not in ("boolean", "object"):
            raise InputError(f"{key}: has no value: give one, see --help")
        value: Any = " ".join(values) if values else "true" if rule["type"] == "boolean" else "{}"
        if key == "terms":
            value = _named_terms(value)
        elif key == "allow_change":
            value = re.findall(r"[\w.]+", value)
        options.append((key, value))
    return options


def _named_terms(text: str) -> dict[str, Any]:
    """Return the terms that a list names with their defaults, the others as null."""
    names = [] if text == "null" else re.findall(r"\w+", text)
    if set(names) - set(_TERMS) or re.sub(r"[\w\s,]", "", text) not in ("", "[]"):
        remedy = f"give names as in [co2, residual], of {', '.join(_TERMS)}; give parameters as --terms.co2.weight 0.5"
        raise InputError(f"terms {shown(text)}: {remedy}")
    return {term: {} if term in names else None for term in _TERMS}


def _help(section: str) -> str:
    """Return the help of all settings, or of those of a section or term, as wide as the terminal."""
    width, lines = shutil.get_terminal_size().columns, [] if section else [_HELP]
    for key, rule in _RULES.items():
        if section and not f"{key}.".startswith(f"{section}."):
            continue
        text, default = rule.get("description", ""), rule.get("default", [])
        if _is_section(rule):
            lines += ["", *textwrap.wrap(f"{key}: {text}", width), ""]
            text = "Add the term with its defaults; null: leave it out."
        elif key == "out":
            lines += ["", "run:", ""]
        if rule["null"] or not _is_section(rule):
            values = "|".join([*rule.get("enum", [_METAVARS[rule["type"]]]), *rule["words"], *["null"] * rule["null"]])
            limits = f"{rule['choose']}; " if "choose" in rule else ""
            text += f" ({limits}default: {default if default and isinstance(default, str) else json.dumps(default)})"
            lines.append(f"  --{key.replace('_', '-')} {values}")
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip()
