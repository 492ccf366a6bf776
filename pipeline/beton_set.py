"""Several betons as one data set, such as `part-*.beton`: the samples of the first, then those of the second, ...

The parts are mapped one after another into one range of addresses: to a backend, they are one file. Their tables are
read where they lie, so that a set takes no more memory of a process than its parts.
"""

import ctypes
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.beton import Beton
from pipeline.manifest import PREPARE_AGAIN, Manifest
from pipeline.sources.patterns import is_pattern, matching_paths
from pipeline.system.errors import InputError
from pipeline.system.limits import open_regular

_MAX_PARTS = 10_000  # the kernel maps up to about 65,000 ranges, of which a part takes up to six
_MAP_FIXED = 0x10
_INTS = [ctypes.c_int] * 3
_COMMA = re.compile(r",(?![^{]*\})")  # outside braces
Convert = Callable[[np.ndarray], np.ndarray]


class Column(np.lib.mixins.NDArrayOperatorsMixin):
    """A column of the tables of all parts. An index copies the rows it takes; any other use, the whole column.

    parts: the column in each part, [n]. convert: what becomes of a part's values.
    """

    def __init__(self, parts: Sequence[np.ndarray], convert: Sequence[Convert] = ()) -> None:
        self._parts, self._convert = parts, convert or [np.asarray] * len(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.dtype, self.shape = self._convert[0](parts[0][:0]).dtype, (int(self._ends[-1]),)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        indices = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        if indices.size and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)}")
        flat = indices.reshape(-1) % len(self)
        numbers = np.searchsorted(self._ends, flat, "right")
        values = np.empty(len(flat), self.dtype)
        for number in np.unique(numbers):
            inside, part = numbers == number, self._parts[number]
            values[inside] = self._convert[number](part[flat[inside] - (self._ends[number] - len(part))])
        return values.reshape(indices.shape)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = zip(self._convert, self._parts, strict=True)
        return np.concatenate([convert(part) for convert, part in parts]).astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (np.asarray(value) if isinstance(value, Column) else value for value in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def max(self) -> Any:
        """Return the largest value."""
        return max(convert(part).max() for convert, part in zip(self._convert, self._parts, strict=True))


class Betons(Beton):
    """Several betons as one, with the attributes of a `Beton`; its columns are those of the parts.

    Classes are joined by name. Without a manifest of each part there are no CRC32s. source: of the parts, for messages.
    tolerate: as for `Beton`. Raises InputError also for a part named twice, and for classes that have no names.
    """

    def __init__(self, paths: Sequence[str], source: Path | str, *, tolerate: bool = False) -> None:
        self.path, self._tolerate = Path(source), tolerate
        if len(paths) > _MAX_PARTS:
            raise InputError(f"{source}: names {len(paths)} betons, more than {_MAX_PARTS}: write larger ones")
        real = [os.path.realpath(path) for path in paths]
        if twice := [path for number, path in enumerate(paths) if real[number] in real[:number]]:
            raise InputError(f"{source}: names {twice[0]} twice: name each part once")
        self.parts = parts = [Beton(path, tolerate=tolerate) for path in paths]
        self._ends = np.cumsum([len(part) for part in parts])
        self.file_size = sum(part.file_size for part in parts)
        self.classes, labels = _join_classes(parts)
        self.manifest, self.columns = _join_manifests(parts, self.classes), None
        self.data, bases = _map(parts)
        self.heights, self.widths, self.modes, self.sizes = (
            self._column(name) for name in ("heights", "widths", "modes", "sizes")
        )
        self.pointers = self._column("pointers", [partial(np.add, np.uint64(base)) for base in bases])
        self.labels = self._column("labels", labels)
        self.crc32 = self._column("crc32") if self.manifest else None
        firsts = (self._ends - [len(part) for part in parts]).tolist()
        self.unreadable = frozenset(
            first + index for first, part in zip(firsts, parts, strict=True) for index in part.unreadable
        )

    def _column(self, name: str, convert: Sequence[Convert] = ()) -> Any:
        return Column([getattr(part, name) for part in self.parts], convert)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def longest_side(self) -> int:
        """The longest side of any image, pixels."""
        return max(part.longest_side for part in self.parts)

    @cached_property
    def most_pixels(self) -> int:
        """The number of pixels of the largest image."""
        return max(part.most_pixels for part in self.parts)

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size]."""
        part, number = self._find(index)
        return part.record(number)

    def name(self, index: int) -> str:
        """Return the source path of sample `index`, or its number in its part."""
        part, number = self._find(index)
        return part.name(number)

    def place(self, index: int) -> tuple[Path, int]:
        """Return the part that contains sample `index`, and its number there."""
        part, number = self._find(index)
        return part.place(number)

    def _find(self, index: int) -> tuple[Beton, int]:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, "right"))
        return self.parts[number], index - int(self._ends[number]) + len(self.parts[number])

    @cached_property
    def fingerprint(self) -> str:
        """Numbers of parts and samples, and a hash of the parts' fingerprints."""
        joined = "\n".join(part.fingerprint for part in self.parts)
        return f"{len(self.parts)}-parts-{len(self)}-{hashlib.sha256(joined.encode()).hexdigest()[:16]}"


def part_paths(source: str) -> list[str]:
    """Return the betons that a source names, in order; [] for a single one that is no pattern.

    source: patterns such as `part-*.beton` or `part-{000..127}.beton`, or names divided by commas.
    """
    names = _COMMA.split(source)
    if os.path.exists(source) or (len(names) == 1 and not is_pattern(source)):
        return []
    return [path for name in names for path in matching_paths(name)]


def _join_classes(parts: Sequence[Beton]) -> tuple[list[str], Sequence[Convert]]:
    """Return the class names of all parts, sorted, and for each part the function of its labels to theirs."""
    named = [part for part in parts if part.classes]
    if all(part.classes == parts[0].classes for part in parts):
        return parts[0].classes, ()
    for part in parts:
        if not part.classes and part.labels.max() >= 0:
            raise InputError(
                f"{part.path}: has labels without class names, and {named[0].path} has names: {PREPARE_AGAIN}"
            )
    classes = sorted({name for part in named for name in part.classes})
    numbers = {name: label for label, name in enumerate(classes)}
    # The last entry is that of label -1.
    joined = [np.array([*(numbers[name] for name in part.classes), -1]) for part in parts]
    return classes, [partial(_renumbered, table) for table in joined]


def _renumbered(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return table[np.maximum(labels, -1)]


def _join_manifests(parts: Sequence[Beton], classes: list[str]) -> Manifest | None:
    """Return a manifest of all parts, with the means of their colors by their numbers of images."""
    manifests = [part.manifest for part in parts if part.manifest]
    if len(manifests) < len(parts):
        return None
    counts, file_size = [each.count for each in manifests], sum(each.file_size for each in manifests)
    mean, std = (
        [round(value, 4) for value in np.average(values, 0, counts).tolist()] if all(values) else []
        for values in ([each.mean for each in manifests], [each.std for each in manifests])
    )
    skipped = [pair for each in manifests for pair in each.skipped]
    return Manifest(sum(counts), classes, 0, file_size, {}, {}, skipped=skipped, mean=mean, std=std)


def _map(parts: Sequence[Beton]) -> tuple[np.ndarray, list[int]]:
    """Map the parts one after another, each from a new page on: uint8, and the first byte of each part.

    A range of addresses is reserved; then each file is mapped to its place there. Raises InputError.
    """
    pages = [-(-part.file_size // mmap.PAGESIZE) * mmap.PAGESIZE for part in parts]
    bases = [sum(pages[:number]) for number in range(len(pages))]
    c_mmap = ctypes.CDLL(None, use_errno=True).mmap
    c_mmap.restype, c_mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *_INTS, ctypes.c_long]
    path = parts[0].path
    try:
        data = np.frombuffer(mmap.mmap(-1, sum(pages), mmap.MAP_PRIVATE | mmap.MAP_ANON, mmap.PROT_READ), np.uint8)
        for part, base in zip(parts, bases, strict=True):
            path, place = part.path, data.ctypes.data + base
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size != part.file_size:
                    raise InputError(f"{path}: was overwritten while it was read: start again")
                flags = mmap.MAP_SHARED | _MAP_FIXED
                if c_mmap(place, part.file_size, mmap.PROT_READ, flags, file.fileno(), 0) != place:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            part.data = data[base : base + part.file_size]
    except OSError as error:
        raise InputError(f"{path}: cannot be mapped ({error.strerror or error}): name fewer parts") from None
    return data, bases
