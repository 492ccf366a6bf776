"""The images of a source in temporary files, mapped: memory does not grow with their number."""

import hashlib
import heapq
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from pipeline.system.chunks import chunks

_ROW = np.dtype(
    [
        ("name_end", "<i8"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("expanded", "<i8"),
        ("group", "<i8"),
        ("crc32", "<i8"),
        ("method", "<i8"),
        ("label", "<i8"),
        ("place", "<i8"),
    ]
)
_FIELDS = tuple(_ROW.names or ())
_FLUSHED_ROWS = 1 << 14
_RUN_ROWS, _MERGED_ROWS = 1 << 18, 1 << 8  # names that are sorted in memory at a time; of each run, while merging


class _Spool:
    """A temporary file without a name, written once and then mapped."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `mapped` closes it

    def append(self, data: Any) -> None:
        self._file.write(data)

    def mapped(self, kind: Any) -> np.ndarray:
        """Return the content, an array of `kind`, and close the file."""
        with self._file as file:
            file.flush()
            empty = os.fstat(file.fileno()).st_size == 0
            return np.zeros(0, kind) if empty else np.asarray(np.memmap(file, kind, "r"))


class Listing(Sequence[Any]):
    """Images of a source, made when asked for: an `Item`, or another of its kind, from a row of a table.

    labels: int64 [n], where they are not those of the rows.
    """

    def __init__(
        self,
        rows: np.ndarray,
        names: np.ndarray,
        places: Sequence[tuple[Callable[..., Any], str, bool, str]],
        order: np.ndarray | None,
        labels: np.ndarray | None = None,
    ) -> None:
        self._rows, self._names, self._places, self._order, self._labels = rows, names, places, order, labels

    def __len__(self) -> int:
        return len(self._rows if self._order is None else self._order)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        row = int(index if self._order is None else self._order[index])
        fields = dict(zip(_FIELDS[1:], self._rows[row].item()[1:], strict=True))
        kind, path, is_folder, column = self._places[fields.pop("place")]
        name = self._name(row)
        group = fields.pop("group")
        if self._labels is not None:
            fields["label"] = int(self._labels[index])
        extra = {"column": column, "group": group} if column else {}
        return kind(name=name, path=path + name if is_folder else path, **fields, **extra)

    @property
    def has_files(self) -> bool:
        """Whether images are files of their own, in a folder, which may change one by one."""
        return any(is_folder for _, _, is_folder, _ in self._places)

    def name_bytes(self, index: int) -> bytes:
        """Return the name of image `index` in UTF-8; bytes that are not UTF-8 as they are."""
        return self._bytes(int(index if self._order is None else self._order[index]))

    def take(self, indices: np.ndarray) -> "Listing":
        """Return images `indices`, int64 [n], in that order."""
        order = indices if self._order is None else self._order[indices]
        return Listing(
            self._rows, self._names, self._places, order, None if self._labels is None else self._labels[indices]
        )

    def relabeled(self, labels: Iterable[int]) -> "Listing":
        """Return the same images with other labels."""
        column = np.fromiter(labels, np.int64, len(self))
        return Listing(self._rows, self._names, self._places, self._order, column)

    def count_unlabeled(self) -> int:
        """Return the number of images without a label."""
        return sum(int((self._label_part(rows) < 0).sum()) for rows in chunks(len(self)))

    def digest(self) -> str:
        """Return a hash of all images, and of size and time of the archives that contain them."""
        digest = hashlib.blake2b(digest_size=16)
        for kind, path, is_folder, column in self._places:
            stat = os.stat(path) if path and not is_folder else None
            facts = kind.__name__, path, is_folder, column, *((stat.st_size, stat.st_mtime_ns) if stat else ())
            digest.update(repr(facts).encode("utf-8", "surrogateescape"))
        for part in (self._rows, self._names, self._order, self._labels):
            digest.update(b"-" if part is None else part.view(np.uint8).data if len(part) else b"")
        return digest.hexdigest()

    def _label_part(self, rows: slice) -> np.ndarray:
        if self._labels is not None:
            return self._labels[rows]
        return self._rows["label"][rows if self._order is None else self._order[rows]]

    def _bytes(self, row: int) -> bytes:
        start, end = self._rows["name_end"][row - 1] if row else 0, self._rows["name_end"][row]
        return self._names[start:end].tobytes()

    def _name(self, row: int) -> str:
        return self._bytes(row).decode("utf-8", "surrogateescape")


class ListingWriter:
    """Collects images one by one.

    folder: for the temporary files; by default the system's. Raises OSError.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._rows, self._names = folder, _Spool(folder), _Spool(folder)
        self._columns = [array("q") for _ in _FIELDS]
        self._pending: list[bytes] = []
        self._places: dict[tuple[Callable[..., Any], str, bool, str], int] = {}
        self._end, self._count, self._last, self._is_sorted = 0, 0, "", True

    def __len__(self) -> int:
        return self._count

    def append(self, item: Any, label: int) -> None:
        """Add an image with this label, or the number that stands for it until `finish`."""
        name = item.name
        data = name.encode("utf-8", "surrogateescape")
        # Of a file in a folder, the folder; so that few places describe all images.
        is_folder = bool(name) and item.offset < 0 and item.path.endswith(name)
        path = item.path[: -len(name)] if is_folder else item.path
        place = type(item), path, is_folder, getattr(item, "column", "")
        number = self._places.setdefault(place, len(self._places))
        self._end += len(data)
        group = getattr(item, "group", 0)
        row = self._end, item.offset, item.size, item.expanded, group, item.crc32, item.method, label, number
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self._pending.append(data)
        self._is_sorted = self._is_sorted and self._last <= name
        self._last = name
        self._count += 1
        if len(self._pending) == _FLUSHED_ROWS:
            self._flush()

    def finish(
        self, labels: Sequence[int] | None = None, *, kept: Sequence[bool] | None = None, by_name: bool = False
    ) -> Listing:
        """Return the images.

        labels: the label for each number that `append` was given. kept: whether images of that number are kept.
        by_name: sort them by name, else by the order in which they were added.
        """
        self._flush()
        rows, names, labeled = self._rows.mapped(_ROW), self._names.mapped(np.uint8), None
        listing = Listing(rows, names, list(self._places), None)
        if kept is not None and not all(kept):
            listing._order = self._written(
                rows_of.start + np.flatnonzero(np.array(kept)[rows["label"][rows_of]]) for rows_of in chunks(len(rows))
            )
        if by_name and not self._is_sorted:
            listing._order = self._by_name(listing)
        if labels is not None:
            of_number = np.array([*labels, 0], np.int64)  # never empty
            labeled = self._written(of_number[listing._label_part(part)] for part in chunks(len(listing)))
        listing._labels = labeled
        return listing

    def _flush(self) -> None:
        rows = np.empty(len(self._pending), _ROW)
        for name, column in zip(_FIELDS, self._columns, strict=True):
            rows[name] = column
        self._rows.append(rows.tobytes())
        self._names.append(b"".join(self._pending))
        self._pending, self._columns = [], [array("q") for _ in _FIELDS]

    def _written(self, parts: Iterable[np.ndarray]) -> np.ndarray:
        """Return parts of an int64 array as one, in a temporary file."""
        spool = _Spool(self._folder)
        for part in parts:
            spool.append(part.astype(np.int64).tobytes())
        return spool.mapped(np.int64)

    def _by_name(self, listing: Listing) -> np.ndarray:
        """Return the rows in the order of their names: runs sorted in memory, then merged."""

        def sorted_run(part: slice) -> np.ndarray:
            rows = np.arange(part.start, part.stop) if listing._order is None else listing._order[part]
            names = [listing._name(row) for row in rows.tolist()]
            return rows[sorted(range(len(rows)), key=names.__getitem__)]

        def named(run: np.ndarray) -> Iterator[tuple[str, int]]:
            for part in chunks(len(run), _MERGED_ROWS):
                yield from ((listing._name(row), row) for row in run[part].tolist())

        runs = [self._written([sorted_run(part)]) for part in chunks(len(listing), _RUN_ROWS)]
        if len(runs) == 1:
            return runs[0]
        return self._written(_arrays(row for _, row in heapq.merge(*map(named, runs))))


def listed(items: Iterable[Any], folder: Path | None = None) -> Listing:
    """Return the items, with their labels, in temporary files."""
    writer = ListingWriter(folder)
    for item in items:
        writer.append(item, item.label)
    return writer.finish()


def _arrays(values: Iterator[int]) -> Iterator[np.ndarray]:
    """Yield the values in arrays of a limited length."""
    part: list[int] = []
    for value in values:
        part.append(value)
        if len(part) == _FLUSHED_ROWS:
            yield np.array(part, np.int64)
            part = []
    yield np.array(part, np.int64)


class Numbers:
    """Numbers for distinct values, in the order in which they first appear."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._number: dict[Any, int] = {}

    def of(self, value: Any) -> int:
        """Return the value's number."""
        try:
            key: Any = (type(value), value)
            number = self._number.get(key)
        except TypeError:  # not hashable: a list
            key = (type(value), repr(value))
            number = self._number.get(key)
        if number is None:
            number = self._number[key] = len(self.values)
            self.values.append(value)
        return number
