"""The documents as tests read them, and the command lines in documents, docstrings and comments."""

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
_NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"{package}/README.md" for package in PACKAGES))
DOCUMENTS = {ROOT / name: (ROOT / name).read_text() for name in _NAMES if (ROOT / name).exists()}
"""Text of each document."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = (
    r"(?:[A-Z_]+=\S+ )*(?:python -m \S|(?:python )?engine/run\.py|accelerate launch |torchrun |sbatch |\./millrace )"
)


@dataclass(frozen=True)
class Line:
    """A command line, split into words."""

    where: str
    words: tuple[str, ...]
    complete: bool = True
    """Nothing is left out, so required arguments are there."""

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def name_of(path: Path) -> str:
    """Return a path relative to the project."""
    return str(path.relative_to(ROOT))


def fences(text: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of a language."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """Return the text outside of fenced blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """Return the code spans outside of fenced blocks, each as one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def section(heading: str) -> str:
    """Return the text under a heading of any document."""
    pattern = re.compile(rf"^(##+) {re.escape(heading)}\n(.*?)(?=^##? |\Z)", re.MULTILINE | re.DOTALL)
    matches = [match for text in DOCUMENTS.values() if (match := pattern.search(text))]
    assert matches, f"no section {heading!r}"
    return matches[0][2]


def snippet(marker: str) -> str:
    """Return the Python block of all documents that contains `marker`."""
    blocks = [body for text in DOCUMENTS.values() for body in fences(text, "python") if marker in body]
    assert len(blocks) == 1, f"{len(blocks)} Python blocks with {marker!r}"
    return blocks[0]


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lines_of_markdown(path: Path) -> list[Line]:
    """Return the command lines of console blocks, and those of code spans, which may leave arguments out."""
    text, lines = DOCUMENTS[path], []
    for body in fences(text, "console"):
        for call in re.findall(r"^\$ (.*)$", body.replace("\\\n", " "), re.MULTILINE):
            lines += _split(name_of(path), call)
    for span in spans(text):
        if re.match(_COMMAND, span):
            lines += _split(name_of(path), span, complete=False)
    return lines


def lines_of_text(where: str, text: str) -> list[Line]:
    """Return the command lines of a docstring or comment.

    They stand after two spaces or a colon, in backticks, or, with options or remarks, at the beginning of a line.
    """
    lines = []
    for call in re.findall(rf"`({_COMMAND}[^`]*)`", text):
        lines += _split(where, call, complete=False)
    rows = text.replace("\\\n", " ").split("\n")
    for number, row in enumerate(rows):
        if match := re.search(rf"(?:  |: |^(?=.*(?: --|\[|  #))) *({_COMMAND}.*)", row):
            call = match[1]
            for following in rows[number + 1 :]:
                if not re.match(r"\s*\[?--\w", following):
                    break
                call += " " + following
            lines += _split(where, call)
    return lines


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module; of a `__main__.py`, the package that `python -m` names."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__main__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a file, including those of fields."""
    constants = [node.value for node in ast.walk(_tree(path)) if isinstance(node, ast.Expr)]
    return [c.value for c in constants if isinstance(c, ast.Constant) and isinstance(c.value, str)]


def comments(path: Path) -> str:
    """Return the comment lines of a YAML file or script, without their marks."""
    return "\n".join(re.sub("^# ?", "", row) if row.startswith("#") else "" for row in path.read_text().split("\n"))


def messages(path: Path) -> Iterator[str]:
    """Yield the strings of a file except docstrings, each as one line, with NUL for formatted values."""
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


def _split(where: str, call: str, complete: bool = True) -> list[Line]:
    """Return the commands of a line of shell, without comments, assignments, and brackets around options.

    A bracket around anything else becomes `...`.
    """
    parts = re.split(r'("[^"]*")', call)
    parts[::2] = [re.sub(r"[\[\]]", " ", re.sub(r"\[(?!-)[^\]\"]*\]", "...", part)) for part in parts[::2]]
    lines = []
    for command in re.split(r" && | ; ", "".join(parts)):
        words = shlex.split(command, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and re.match(_COMMAND, " ".join([*words, ""])):
            lines.append(Line(where, tuple(words), complete and "..." not in words))
    return lines
