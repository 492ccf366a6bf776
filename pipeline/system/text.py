"""Text for terminals and logs."""

import unicodedata


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, in the plural where it is not 1."""
    return f"{number} {noun}{'s' * (number != 1)}"


def binary(size: float) -> str:
    """Return a number of bytes in GiB, or, below 0.1 GiB, in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def printable(text: str) -> str:
    """Return `text` in one line, with control characters and bytes that are not UTF-8 escaped."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else ascii(letter)[1:-1]
        for letter in text
    )
