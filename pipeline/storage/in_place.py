"""Images read where they are, without a beton: a folder, a tar, ILSVRC2012's tar of tars, WebDataset shards.

An index takes the place of the beton's tables: where each JPEG's bytes stand and how large its image is, from the
headers alone, read once and kept in the user's cache. A single tar is then read by every backend as a beton is, from
its memory map; folders and several tars by the DALI backend. There is no manifest, so that a record is checked by its
decoding alone. What is not an RGB or gray JPEG needs `pipeline.prepare`. As by torchvision's loader, EXIF orientation
is ignored.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.beton import PIXELS_A_BYTE, Beton
from pipeline.native.libffcv import JPEG
from pipeline.sources.archives import Item, Source, open_source, tar_files
from pipeline.storage.decode import jpeg_frame
from pipeline.system.cores import available_cores
from pipeline.system.errors import BadRecords, InputError
from pipeline.system.files import write_atomic
from pipeline.system.limits import LARGEST_FILE, LARGEST_IMAGE, MOST_CLASSES, open_regular, read_bytes
from pipeline.system.progress import progress

_HEADER = 1 << 16  # bytes of a file that hold its frame header, nearly always
_FORMAT = 1
_CHUNK = 1000
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")
_MOST_TARS, _MOST_BRACES = 100_000, 8


class Direct(Beton):
    """Images of a folder or of tars, with the attributes of a `Beton`.

    source: a folder, a .tar, or several by a pattern such as `shards/train-*.tar` or `train-{000..127}.tar`.
    tolerate: as `Beton`'s. Raises InputError where there is no image, and BadRecords for images that are not RGB or
    gray JPEGs.
    """

    def __init__(self, source: Path | str, *, tolerate: bool = False) -> None:
        self.path, self._tolerate = Path(source), tolerate
        found = _listed(str(source))
        self._names, self._classes = [item.name for item in found.items], found.classes
        self._files = sorted({item.path for item in found.items})
        number = {path: i for i, path in enumerate(self._files)}
        self._file = np.array([number[item.path] for item in found.items])
        whole = np.array([item.offset < 0 for item in found.items])
        self.labels = np.array([item.label for item in found.items], np.int64)
        self.manifest = self.crc32 = None
        self.unreadable: frozenset[int] = frozenset()
        self._index(found.items)
        self.modes = np.full(len(self), JPEG, np.uint8)
        single = len(self._files) == 1 and not whole.any()
        self.data: np.ndarray = np.memmap(self._files[0], np.uint8, "r") if single else np.zeros(0, np.uint8)
        self.file_size = sum(os.path.getsize(path) for path in self._files) if not whole.any() else 0
        self._maps: dict[int, np.ndarray] = {0: self.data} if single else {}
        self._whole = bool(whole.any())

    @property
    def in_one_file(self) -> bool:
        """Whether all records stand in one file, so that every backend can read them."""
        return len(self.data) > 0

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty where unknown."""
        return self._classes

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size]."""
        if self._whole:
            return np.fromfile(self._files[self._file[index]], np.uint8)
        file = int(self._file[index])
        if file not in self._maps:
            self._maps[file] = np.memmap(self._files[file], np.uint8, "r")
        start = int(self.pointers[index])
        return self._maps[file][start : start + int(self.sizes[index])]

    def name(self, index: int) -> str:
        """Return where sample `index` stands in the source."""
        return self._names[index]

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """A hash of names, places and image sizes: tells two sources apart."""
        return self._hash

    def _index(self, items: list[Item]) -> None:
        """Set what a beton's tables say: places, sizes, sides, what is unreadable; sides from the cache, if there."""
        self.pointers = np.array([max(item.offset, 0) for item in items], np.uint64)
        stated = [item.size or os.path.getsize(item.path) for item in items]
        self.sizes = np.array(stated, np.uint64)
        places = os.fsencode("\n".join(self._names)) + self.pointers.tobytes() + self.sizes.tobytes()
        stamps = [f"{os.path.abspath(path)} {os.stat(path).st_mtime_ns}" for path in self._files]
        key = hashlib.sha256(places + f"{_FORMAT} {stamps}".encode()).hexdigest()[:32]
        cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace" / f"direct-{key}.sides"
        sides = _cached(cached, len(items))
        if sides is None:
            sides = _read_sides(items)
            _cache(cached, sides)
        pixels = sides.prod(axis=1, dtype=np.int64)
        forged = (pixels // PIXELS_A_BYTE > self.sizes.astype(np.int64)) | (pixels > LARGEST_IMAGE)
        bad = np.flatnonzero((sides <= 0).any(axis=1) | forged)
        if len(bad) and not (self._tolerate and len(bad) < len(items)):
            faults = [(int(index), "not an RGB or gray JPEG") for index in bad]
            raise BadRecords(
                f"{self.path}: {self._names[bad[0]]} is not an RGB or gray JPEG ({len(bad)} such images): write a "
                "beton of them with python -m pipeline.prepare, or pass over them with --data.on_bad skip",
                faults,
            )
        self.unreadable = frozenset(int(index) for index in bad)
        sides[bad] = 1
        self.heights, self.widths = sides[:, 0].copy(), sides[:, 1].copy()
        self._hash = f"direct-{hashlib.sha256(places + sides.tobytes()).hexdigest()[:16]}-{len(items)}"


def _cached(path: Path, count: int) -> np.ndarray | None:
    """Return the sizes that were kept, int32 [N, 2]; None where there are none, or not of so many images."""
    try:
        data = read_bytes(path, 8 * count, "remove it")
    except InputError:
        return None
    return np.frombuffer(data, np.int32).reshape(-1, 2).copy() if len(data) == 8 * count else None


def _cache(path: Path, sides: np.ndarray) -> None:
    """Keep the sizes for the next time; where that cannot be, they are read again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sides.tobytes())
    except OSError:
        return


def _read_sides(items: list[Item]) -> np.ndarray:
    """Return height and width of each image from its JPEG header, 0 where it is none: int32 [N, 2]."""
    with ThreadPoolExecutor(4 * available_cores()) as pool:
        found: list[tuple[int, int]] = []
        for start in progress(range(0, len(items), _CHUNK), f"headers, {_CHUNK} each", quiet=len(items) < 10 * _CHUNK):
            found += pool.map(_side_lengths, items[start : start + _CHUNK])
    return np.array(found, np.int32).reshape(-1, 2)


def _side_lengths(item: Item) -> tuple[int, int]:
    try:
        with open_regular(item.path) as file:
            whole = item.size or os.fstat(file.fileno()).st_size
            for count in (min(_HEADER, whole), whole) if whole <= LARGEST_FILE else ():
                data = np.frombuffer(os.pread(file.fileno(), count, max(item.offset, 0)), np.uint8)
                height, width, components = (int(number) for number in jpeg_frame(data))
                if height:
                    return (height, width) if components in (1, 3) else (0, 0)
    except OSError:
        pass
    return 0, 0


def _listed(source: str) -> Source:
    """Return the images of a folder or tar, or of all tars of a pattern; WebDataset's labels where it has some."""
    paths = _paths(source)
    listed = [open_source(path) for path in paths]
    items = [item for found in listed for item in found.items]
    labels = _class_files(paths, items)
    if labels is not None:
        return _relabeled(items, labels, [str(number) for number in range(max(labels) + 1)])
    if len(listed) == 1:
        return listed[0]
    classes = sorted({name for found in listed for name in found.classes})
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[found.classes[i.label]] if i.label >= 0 else -1 for found in listed for i in found.items]
    return _relabeled(items, labels, classes)


def _relabeled(items: list[Item], labels: list[int], classes: list[str]) -> Source:
    return Source([replace(item, label=label) for item, label in zip(items, labels, strict=True)], classes)


def _paths(source: str) -> list[str]:
    """Return the folder or tar, or all tars of a pattern. Raises InputError for what is not read directly."""
    matching = (
        path for name in _expanded(source) for path in (sorted(glob.glob(name)) if _is_pattern(name) else [name])
    )
    paths = list(islice(matching, _MOST_TARS + 1))
    if len(paths) > _MOST_TARS:
        raise InputError(f"{source[:200]}: stands for more than {_MOST_TARS} files: give fewer at once")
    if not paths:
        raise InputError(f"{source}: no such files: give a folder, a .tar, or a pattern of tars")
    if source.endswith(".zip") or source.startswith("synthetic:"):
        raise InputError(f"{source}: not read directly: write a beton with python -m pipeline.prepare")
    if os.path.isdir(source) and (tars := glob.glob(os.path.join(glob.escape(source), "*.tar"))):
        inside = next(Path(source).rglob("*.jp*g"), None)
        if inside is None:
            raise InputError(f"{source}: holds no image but {len(tars)} tars: name these, {source.rstrip('/')}/*.tar")
    return paths


def _is_pattern(source: str) -> bool:
    return bool(glob.has_magic(source) or _BRACES.search(source)) and not os.path.exists(source)


def _expanded(source: str) -> Iterator[str]:
    """Yield the names that braces such as {000..127} or {a,b} stand for, as WebDataset writes them."""
    found = _BRACES.search(source)
    if found is None or os.path.exists(source):
        yield source
        return
    if source.count("{") > _MOST_BRACES:
        raise InputError(f"{source[:200]}: has more than {_MOST_BRACES} braces: give fewer")
    first, last, listed = found.groups()
    parts = listed.split(",") if listed else (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    for part in parts:
        yield from _expanded(source[: found.start()] + part + source[found.end() :])


def _class_files(paths: Iterable[str], items: list[Item]) -> list[int] | None:
    """Return each image's label from the NAME.cls beside it, as WebDataset has them; None where there are none."""
    found: dict[tuple[str, str], int] = {}
    for path in paths:
        if not path.endswith(".tar") or any(item.label >= 0 for item in items):
            return None
        for item in tar_files(path):
            if item.name.endswith(".cls") and item.size < 32:
                text = item.read().strip()
                if text.isdigit():
                    if int(text) >= MOST_CLASSES:
                        raise InputError(f"{path}: {item.name} holds label {int(text)}: give less than {MOST_CLASSES}")
                    found[path, item.name[: -len(".cls")]] = int(text)
    labels = [found.get((item.path, str(PurePosixPath(item.name).with_suffix(""))), -1) for item in items]
    return labels if found else None


def open_data(path: Path | str, *, tolerate: bool = False) -> Beton:
    """Return the beton at `path`, or a folder or tar that is read directly."""
    known = (".tar", ".zip")
    if str(path).endswith(".beton") or not (
        os.path.isdir(path) or str(path).endswith(known) or str(path).startswith("synthetic:") or _is_pattern(str(path))
    ):
        return Beton(path, tolerate=tolerate)
    return Direct(path, tolerate=tolerate)
