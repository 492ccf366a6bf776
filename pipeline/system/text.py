"""Text for terminals and logs."""

import unicodedata


def printable(text: str) -> str:
    """Return `text` in one line, with control characters and bytes that are not UTF-8 escaped."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else ascii(letter)[1:-1]
        for letter in text
    )
