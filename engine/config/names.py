"""Lists of names, as settings."""

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError


def _listed(value: Any) -> list[str]:
    """Return the names of a list, or of a text with commas or spaces between them."""
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PydanticCustomError("names", "not names")
    return names


Names = Annotated[list[str] | str, PlainValidator(_listed), WithJsonSchema({"type": "array"})]
"""A list of names; one text with commas or spaces between them is read as such a list."""
