"""Dataclasses that pydantic validates, with its errors as one line: key, value, remedy."""

import difflib
import functools
from collections.abc import Iterator
from dataclasses import field
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from engine.config.renamed import former
from engine.config.setting_error import SettingError

Kind = TypeVar("Kind")
Rules = dict[str, dict[str, Any]]
"""JSON Schema of settings, sections and terms by dotted name, with `null` (is it allowed?), `words` (other values
allowed) and `choose` (bounds in words)."""
_CONFIG = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False, extra="forbid")
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_SHOWN_CHARACTERS = 200
_SYNONYMS = {
    "batch_size": "data.batch",
    "image_size": "data.size",
    "num_workers": "data.workers",
    "backbone": "model.arch",
    "learning_rate": "optim.lr",
    "optimizer": "optim.name",
    "warmup": "optim.warmup_epochs",
    "wd": "optim.weight_decay",
    "output_dir": "out",
}
"""Other trainers' names of settings, that no similarity of spelling leads to."""
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list such as [160, 224]",
    "object": "a mapping such as {weight: 1}",
    "terms": "names such as [co2, residual]",
    "data.views": "two mappings such as [{hue: 0}, {}]",
    "data.mean": "three numbers such as [0.485, 0.456, 0.406], or auto",
    "data.std": "three numbers such as [0.229, 0.224, 0.225], or auto",
    "tracker": "names such as [tensorboard, wandb]",
    "tracking.tags": "names such as [moco_v2, imagenet]",
}


@dataclass_transform(field_specifiers=(field,))
def section(kind: type[Kind]) -> type[Kind]:
    """Make a dataclass that validates its arguments. Raises SettingError for wrong ones."""
    made: Any = dataclass(config=_CONFIG)(kind)
    validated = made.__init__

    @functools.wraps(validated)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            validated(self, *args, **values)
        except ValidationError as error:
            raise explain(error, made) from None

    made.__init__ = __init__
    return made


def choose(words: str, **bounds: Any) -> Any:
    """Return pydantic's bounds for a number. The error names them in these words."""
    return Field(json_schema_extra={"choose": words}, **bounds)


@functools.cache
def rules(kind: type) -> Rules:
    """Return the rules of a dataclass's fields, and of its sections' fields."""
    schema = TypeAdapter(kind).json_schema()
    return dict(_rules(schema, schema.get("$defs", {}), ""))


def _rules(schema: dict[str, Any], definitions: dict[str, Any], within: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, rule in schema["properties"].items():
        first, *others = rule.get("anyOf", [rule])  # the others: null or a word
        inner = definitions.get(first.get("$ref", "").rpartition("/")[2], {})
        words = [other["const"] for other in others if "const" in other]
        yield within + name, {**inner, **first, **rule, "null": {"type": "null"} in others, "words": words}
        if inner:
            yield from _rules(inner, definitions, f"{within}{name}.")


def explain(error: ValidationError, kind: type) -> SettingError:
    """Return the error for the first of pydantic's errors on this dataclass."""
    prefix = "" if kind.__name__ == "Settings" else f"{kind.__name__.lower()}."
    known = {prefix + name: rule for name, rule in rules(kind).items()}
    first = error.errors(include_url=False)[0]
    wrong, value = first["type"], first["input"]
    if wrong == "value_error":
        return first["ctx"]["error"]  # raised by a `__post_init__`
    parts = [part for part in first["loc"] if isinstance(part, str)]
    if wrong != "unexpected_keyword_argument":  # else the last parts may be members of a union, or keys of a mapping
        parts = next((parts[:n] for n in range(len(parts), 0, -1) if prefix + ".".join(parts[:n]) in known), parts)
    key = prefix + ".".join(parts)
    if (renamed := former(key, value)) or key not in known:
        return renamed or unknown(key, known)
    rule = known[key]
    if wrong in _BOUNDS:
        remedy = f"choose {rule['choose']}"
    elif wrong == "finite_number":
        remedy = "give a finite number"
    elif "enum" in rule:
        remedy = f"choose one of {', '.join(map(repr, rule['enum']))}"
    else:
        remedy = f"wrong type: give {_TYPES.get(key) or _TYPES[rule['type']]}"
    return SettingError(key, shown(value), f"{remedy}{', or null' if rule['null'] else ''}")


def shown(value: Any) -> str:
    """Return a value as an error shows it."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."


def unknown(key: str, known: Rules, typed: str = "") -> SettingError:
    """Return the error for an unknown setting, with the closest name that is one. typed: the key as typed."""
    within, _, name = key.rpartition(".")
    if (close := _SYNONYMS.get(name, "")) not in known:
        similar = difflib.get_close_matches(key, known, n=1) or [other for other in known if other.endswith(f".{name}")]
        close = similar[0] if similar else ""
    siblings = _names_in(within, known) or _names_in("terms", known)
    remedy = f"choose one of {', '.join(siblings)}" if within.startswith("terms") else "see --help for all of them"
    suggestion = f", did you mean {close}" if close else ""
    return SettingError(typed or key, "", f"no such setting{suggestion}: {remedy}")


def _names_in(section: str, known: Rules) -> list[str]:
    return [name for within, _, name in (key.rpartition(".") for key in known) if within == section]
