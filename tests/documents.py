"""Markdown as tests read it, and the command lines in it, in docstrings and in comments."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests import ROOT

PACKAGES = ("pipeline", "methods", "engine", "benchmarks")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BEGIN = (
    r"(?:[A-Z_]+=\S+ )*(?:python -m \S|(?:python )?engine/run\.py|accelerate launch |torchrun |sbatch |\./millrace )"
)


@dataclass(frozen=True)
class Line:
    """A command line, by words."""

    where: str
    words: tuple[str, ...]
    whole: bool = True
    """Whether it can be given as it stands: nothing is left out."""

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def fences(text: str, language: str | None = None) -> list[str]:
    """Return the contents of the fenced blocks, of one language where one is given."""
    return [body for name, body in _FENCE.findall(text) if language in (None, name)]


def prose(text: str) -> str:
    """Return what stands outside of fenced blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """Return the code spans outside of fenced blocks, each in one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def section(text: str, heading: str) -> str:
    """Return the text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading!r}"
    return found[1]


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lines_of_markdown(path: Path) -> list[Line]:
    """Return the command lines of console blocks, and those of code spans, which need not be whole."""
    text, found = path.read_text(), []
    for body in fences(text, "console"):
        for call in re.findall(r"^\$ (.*)$", body.replace("\\\n", " "), re.MULTILINE):
            found += _split(path.name, call)
    for span in spans(text):
        if re.match(_BEGIN, span):
            found += [Line(path.name, line.words, whole=False) for line in _split(path.name, span)]
    return found


def lines_of_text(where: str, text: str) -> list[Line]:
    """Return the command lines of a docstring or comment: after two spaces or a colon, in backticks, or, with options
    or remarks, at the beginning of a line."""
    found = []
    for call in re.findall(rf"`({_BEGIN}[^`]*)`", text):
        found += [Line(where, line.words, whole=False) for line in _split(where, call)]
    rows = text.replace("\\\n", " ").split("\n")
    for number, row in enumerate(rows):
        if begun := re.search(rf"(?:  |: |^(?=.*(?: --|\[|  #))) *({_BEGIN}.*)", row):
            call = begun[1]
            for following in rows[number + 1 :]:
                if not re.match(r"\s*\[?--\w", following):
                    break
                call += " " + following
            found += _split(where, call)
    return found


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module; of a `__main__.py`, the package that `python -m` names."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__main__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a file, those of fields too."""
    nodes = ast.walk(_tree(path))
    return [
        node.value.value
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def comments(path: Path) -> str:
    """Return the comment lines of a YAML file or script, without their marks."""
    return "\n".join(re.sub("^# ?", "", row) if row.startswith("#") else "" for row in path.read_text().split("\n"))


def messages(path: Path) -> Iterator[str]:
    """Yield the strings of a file but for docstrings, each in one line, NUL for what is formatted into it."""
    tree = _tree(path)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) not in documentation and (text := _text(node)):
            yield " ".join(text.split())


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "\0" for part in node.values)
    return ""


def _split(where: str, call: str) -> list[Line]:
    """Return the commands of a line of shell, without comments, assignments before them, and brackets around options.

    A bracket around anything but an option is left out, as is `...`.
    """
    bare = [re.sub(r"\[(?!-)[^\]\"]*\]", "...", part) for part in re.split(r'("[^"]*")', call)[::2]]
    bare = [part.replace("[", " ").replace("]", " ") for part in bare]
    quoted = re.split(r'("[^"]*")', call)[1::2]
    call = "".join(part for pair in zip(bare, [*quoted, ""], strict=True) for part in pair)
    found = []
    for part in re.split(r" && | ; ", call):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and re.match(_BEGIN, " ".join([*words, ""])):
            found.append(Line(where, tuple(words), "..." not in words))
    return found
