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
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
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
Convert = Callable[[Any, Any], Any]


class Column(np.lib.mixins.NDArrayOperatorsMixin):
    """A column of the tables of all parts. An index copies the rows it takes; any other use, the whole column.

    parts: the column in each part, [n], of one type. convert: (values of a part or several, the numbers of their parts)
    to the column's values.
    """

    def __init__(self, parts: Sequence[np.ndarray], convert: Convert = lambda values, _: values) -> None:
        self._parts, self._convert = parts, convert
        lengths = np.array([len(part) for part in parts])
        self._ends = np.cumsum(lengths)
        # Rows of all parts are gathered at once, by their addresses in an array that spans all parts.
        addresses = np.array([part.__array_interface__["data"][0] for part in parts])
        self._strides = np.array([part.strides[0] for part in parts])
        self._starts = addresses - addresses.min() - (self._ends - lengths) * self._strides  # of row 0 of the column
        span = int((addresses - addresses.min() + (lengths - 1) * self._strides).max()) + 1
        place, kind = (int(addresses.min()), True), parts[0].dtype.str
        described = {"data": place, "shape": (span,), "strides": (1,), "typestr": kind, "version": 3}
        self._memory = np.asarray(SimpleNamespace(__array_interface__=described))
        self.dtype, self.shape = convert(parts[0][:1], 0).dtype, (int(self._ends[-1]),)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        indices = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        if indices.size and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)}")
        indices = indices % len(self)
        numbers = np.searchsorted(self._ends, indices, "right")
        return self._convert(self._memory[self._starts[numbers] + indices * self._strides[numbers]], numbers)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = [self._convert(part, number) for number, part in enumerate(self._parts)]
        return np.concatenate(parts).astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (np.asarray(value) if isinstance(value, Column) else value for value in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def max(self) -> Any:
        """Return the largest value."""
        return max(self._convert(part, number).max() for number, part in enumerate(self._parts))


class Betons(Beton):
    """Several betons as one, with the attributes of a `Beton`; its columns are those of the parts.

    Classes are joined by name. Without a manifest of each part there are no CRC32s. source: of the parts, for messages.
    tolerate: as for `Beton`. Raises InputError also for a part named twice, and for classes that have no names.
    """

    def __init__(self, paths: Sequence[str], source: Path | str, *, tolerate: bool = False) -> None:
        self.path, self._tolerate = Path(source), tolerate
        if len(paths) > _MAX_PARTS:
            raise InputError(f"{source}: names {len(paths)} betons, more than {_MAX_PARTS}: write larger ones")
        files: set[str] = set()
        for path in paths:
            if (file := os.path.realpath(path)) in files:
                raise InputError(f"{source}: names {path} twice: name each part once")
            files.add(file)
        self.parts = parts = [Beton(path, tolerate=tolerate) for path in paths]
        self._ends = np.cumsum([len(part) for part in parts])
        self.file_size = sum(part.file_size for part in parts)
        self.classes, convert_labels = _join_classes(parts)
        self.manifest, self.columns = _join_manifests(parts, self.classes), None
        self.data, bases = _map(parts)
        self.heights, self.widths, self.modes, self.sizes = (
            self._column(name) for name in ("heights", "widths", "modes", "sizes")
        )
        firsts = np.array(bases, np.uint64)
        self.pointers = self._column("pointers", lambda values, numbers: values + firsts[numbers])
        self.labels = self._column("labels", convert_labels)
        self.crc32 = self._column("crc32") if self.manifest else None
        self.unreadable = frozenset(
            int(end) - len(part) + index
            for end, part in zip(self._ends, parts, strict=True)
            for index in part.unreadable
        )

    def _column(self, name: str, convert: Convert = lambda values, _: values) -> Any:
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


def _join_classes(parts: Sequence[Beton]) -> tuple[list[str], Convert]:
    """Return the class names of all parts, sorted, and the function of the parts' labels to theirs."""
    named = [part for part in parts if part.classes]
    if all(part.classes == parts[0].classes for part in parts):
        return parts[0].classes, lambda labels, _: labels
    for part in parts:
        if not part.classes and part.labels.max() >= 0:
            raise InputError(
                f"{part.path}: has labels without class names, and {named[0].path} has names: {PREPARE_AGAIN}"
            )
    classes = sorted({name for part in named for name in part.classes})
    numbers = {name: number for number, name in enumerate(classes)}
    joined = np.array([label for part in parts for label in (-1, *(numbers[name] for name in part.classes))])
    firsts = np.cumsum([1, *(1 + len(part.classes) for part in parts)])  # in `joined`, of each part's label 0
    return classes, lambda labels, part: joined[firsts[part] + np.maximum(labels, -1)]


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
    bases = [0, *accumulate(pages[:-1])]
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
