"""Labels from a list, for images without class folders, such as ImageNet's validation images."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.sources.archives import Source
from pipeline.system.errors import InputError
from pipeline.system.limits import LIST_BYTES, MAX_CLASSES, read_text

_REMEDY = "give a text or CSV file of NAME CLASS lines, such as LOC_val_solution.csv"
_MAX_DIGITS = 20


def relabel(source: Source, file: Path, classes: Sequence[str] = ()) -> Source:
    """Return the source with the classes from a list.

    file: lines of NAME CLASS, separated by blanks or commas; more columns may follow. A name may lack folders and
        suffix. Lines of other images, such as a heading, are skipped.
    classes: names by label; the list may then give labels, too. Default: the names in the list, sorted.

    Raises InputError where the file cannot be read, lacks an image, gives one two classes, or names an unknown class.
    """
    listed = _read(file)
    image_classes, missing = [], []
    for item in source.items:
        keys = (item.name, PurePosixPath(item.name).name, PurePosixPath(item.name).stem)
        image_classes.append(next((listed[key] for key in keys if key in listed), ""))
        if not image_classes[-1]:
            missing.append(item.name)
    if missing:
        others = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
        raise InputError(f"{file}: {missing[0]}{others} not in it: {_REMEDY}")
    names = list(classes) or sorted(set(image_classes), key=lambda name: (int(name) if name.isdecimal() else -1, name))
    number = {name: label for label, name in enumerate(names)}
    if classes:
        number = {str(label): label for label in range(len(names))} | number
    for item, name in zip(source.items, image_classes, strict=True):
        if name not in number:
            raise InputError(
                f"{file}: class {name} of {item.name} is none of the {len(names)}, such as {names[0]}: {_REMEDY}"
            )
    return source.relabeled([number[name] for name in image_classes], names)


def _read(file: Path) -> dict[str, str]:
    """Return the class of each name in the list."""
    listed: dict[str, str] = {}
    for line_number, line in enumerate(read_text(file, LIST_BYTES, _REMEDY, "surrogateescape").splitlines(), start=1):
        parts = re.split(r"[\s,]+", line.strip(), maxsplit=2)
        if parts == [""]:
            continue
        if len(parts) < 2:
            raise InputError(f"{file}, line {line_number}: {line.strip()[:60]!r} names no class: {_REMEDY}")
        if listed.setdefault(parts[0], parts[1]) != parts[1]:
            raise InputError(f"{file}, line {line_number}: {parts[0]} has two classes: remove one of its lines")
    return listed


def numbered(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return label numbers, -1 for empty text, and class names by label.

    Numbers are labels already; other names are numbered in sorted order.
    """
    names = set(labels) - {""}
    if all(name.isdecimal() for name in names):
        classes = [str(number) for number in range(max(map(int, names), default=-1) + 1)]
        return [int(label or -1) for label in labels], classes
    number = {name: label for label, name in enumerate(sorted(names))}
    return [number.get(label, -1) for label in labels], list(number)


def check_number(label: str, place: str) -> None:
    """Raise InputError for a number that is too large for a label."""
    if label.isdecimal() and (len(label) > _MAX_DIGITS or int(label) >= MAX_CLASSES):
        raise InputError(f"{place} has label {label[:_MAX_DIGITS]}: give less than {MAX_CLASSES}")
