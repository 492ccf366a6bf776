"""Images read in place, without a beton: a folder, a tar, ILSVRC2012's tar of tars, WebDataset shards.

An index replaces the beton's tables: the place of each JPEG's bytes and the size of its image, read once from the
headers and cached in the user's cache folder. All backends can read a single tar, from its memory map, as they read a
beton; only DALI reads folders and several tars. Without a manifest, decoding is the only check of a record. Images
other than RGB or gray JPEGs need `pipeline.prepare`. EXIF orientation is ignored, as by torchvision's loader.
"""

import contextlib
import glob
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.beton import MAX_PIXELS_PER_BYTE, Beton
from pipeline.beton_format import JPEG
from pipeline.beton_set import Betons, part_paths
from pipeline.sources.archives import Item
from pipeline.sources.images import list_images
from pipeline.sources.patterns import is_pattern, matching_paths
from pipeline.sources.tables import is_saved_dataset
from pipeline.storage.decode import jpeg_frame
from pipeline.system.cores import available_cores
from pipeline.system.errors import BadRecords, InputError
from pipeline.system.files import write_atomic
from pipeline.system.limits import MAX_FILE_BYTES, MAX_IMAGE_PIXELS, open_regular, read_bytes
from pipeline.system.progress import progress

_HEADER_BYTES = 1 << 16  # the start of a file, which nearly always contains its frame header
_CACHE_FORMAT = 1
_CHUNK_IMAGES = 1000


class Direct(Beton):
    """Images of a folder or of tars, with the attributes of a `Beton`.

    source: a folder, a .tar, or several by a pattern such as `shards/train-*.tar` or `train-{000..127}.tar`.
    tolerate: as for `Beton`. Raises InputError if there is no image, and BadRecords for images other than RGB or
    gray JPEGs.
    """

    def __init__(self, source: Path | str, *, tolerate: bool = False) -> None:
        self.path, self._tolerate = Path(source), tolerate
        _check_source(str(source))
        images = list_images([str(source)])
        items, self.classes = list(images.items), images.classes
        self._names = [item.name for item in items]
        self._files = sorted({item.path for item in items})
        number = {path: i for i, path in enumerate(self._files)}
        self._file = np.array([number[item.path] for item in items])
        self._loose = any(item.offset < 0 for item in items)  # each image is a file
        self.labels = np.array([item.label for item in items], np.int64)
        self.manifest = self.columns = self.crc32 = None
        self._index(items)
        self.modes = np.full(len(self), JPEG, np.uint8)
        self.in_one_file = len(self._files) == 1 and not self._loose
        self.data: np.ndarray = np.memmap(self._files[0], np.uint8, "r") if self.in_one_file else np.zeros(0, np.uint8)
        self.file_size = 0 if self._loose else sum(os.path.getsize(path) for path in self._files)
        self._maps: dict[int, np.ndarray] = {0: self.data} if self.in_one_file else {}

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size]."""
        if self._loose:
            return np.fromfile(self._files[self._file[index]], np.uint8)
        file = int(self._file[index])
        if file not in self._maps:
            self._maps[file] = np.memmap(self._files[file], np.uint8, "r")
        start = int(self.pointers[index])
        return self._maps[file][start : start + int(self.sizes[index])]

    def name(self, index: int) -> str:
        """Return the path of sample `index` in the source."""
        return self._names[index]

    def _index(self, items: list[Item]) -> None:
        """Set places, sizes and sides of the images, as a beton's tables do, and list the unreadable ones."""
        self.pointers = np.array([max(item.offset, 0) for item in items], np.uint64)
        self.sizes = np.array([item.size or os.path.getsize(item.path) for item in items], np.uint64)
        places = os.fsencode("\n".join(self._names)) + self.pointers.tobytes() + self.sizes.tobytes()
        stamps = [f"{os.path.abspath(path)} {os.stat(path).st_mtime_ns}" for path in self._files]
        key = hashlib.sha256(places + f"{_CACHE_FORMAT} {stamps}".encode()).hexdigest()[:32]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace" / f"direct-{key}.sides"
        sides = _load_cached(cache, len(items))
        if sides is None:
            sides = _read_sides(items)
            with contextlib.suppress(OSError):  # no cache: they are read again next time
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(cache, sides.tobytes())
        pixels = sides.prod(axis=1, dtype=np.int64)
        forged = (pixels // MAX_PIXELS_PER_BYTE > self.sizes.astype(np.int64)) | (pixels > MAX_IMAGE_PIXELS)
        bad = np.flatnonzero((sides <= 0).any(axis=1) | forged)
        if len(bad) and not (self._tolerate and len(bad) < len(items)):
            faults = [(int(index), "not an RGB or gray JPEG") for index in bad]
            raise BadRecords(
                f"{self.path}: {self._names[bad[0]]} is not an RGB or gray JPEG ({len(bad)} such images): write a "
                "beton of them with python -m pipeline.prepare, or skip them with --data.on-bad skip",
                faults,
            )
        self.unreadable = frozenset(int(index) for index in bad)
        sides[bad] = 1
        self.heights, self.widths = sides[:, 0].copy(), sides[:, 1].copy()
        # Of names, places and image sizes.
        self.fingerprint = f"direct-{hashlib.sha256(places + sides.tobytes()).hexdigest()[:16]}-{len(items)}"


def _load_cached(path: Path, count: int) -> np.ndarray | None:
    """Return the cached sides, int32 [N, 2]; None without a cache of so many images."""
    try:
        data = read_bytes(path, 8 * count, "remove it")
    except InputError:
        return None
    return np.frombuffer(data, np.int32).reshape(-1, 2).copy() if len(data) == 8 * count else None


def _read_sides(items: list[Item]) -> np.ndarray:
    """Return height and width of each image from its JPEG header, 0 for other images: int32 [N, 2]."""
    starts, unit = range(0, len(items), _CHUNK_IMAGES), f"headers, {_CHUNK_IMAGES} each"
    sides: list[tuple[int, int]] = []
    with ThreadPoolExecutor(4 * available_cores()) as pool:  # they wait for the disk
        for start in progress(starts, unit, quiet=len(items) < 10 * _CHUNK_IMAGES):
            sides += pool.map(_side_lengths, items[start : start + _CHUNK_IMAGES])
    return np.array(sides, np.int32).reshape(-1, 2)


def _side_lengths(item: Item) -> tuple[int, int]:
    try:
        with open_regular(item.path) as file:
            size = item.size or os.fstat(file.fileno()).st_size
            for count in (min(_HEADER_BYTES, size), size) if size <= MAX_FILE_BYTES else ():
                data = np.frombuffer(os.pread(file.fileno(), count, max(item.offset, 0)), np.uint8)
                height, width, components = (int(number) for number in jpeg_frame(data))
                if height:
                    return (height, width) if components in (1, 3) else (0, 0)
    except OSError:
        pass
    return 0, 0


def _check_source(source: str) -> None:
    """Raise InputError for a source that is not read in place, and for a folder whose images are in tars."""
    paths = matching_paths(source)
    tables = any(path.endswith(".parquet") or is_saved_dataset(Path(path)) for path in paths)
    if tables or source.endswith(".zip") or source.startswith("synthetic:"):
        raise InputError(f"{source}: not read directly: write a beton with python -m pipeline.prepare")
    tars = glob.glob(os.path.join(glob.escape(source), "*.tar")) if os.path.isdir(source) else []
    if tars and next(Path(source).rglob("*.jp*g"), None) is None:
        raise InputError(f"{source}: has no image but {len(tars)} tars: name these, {source.rstrip('/')}/*.tar")


def open_data(path: Path | str, *, tolerate: bool = False) -> Beton:
    """Return the beton at `path`, several betons as one set, or the folder or tars there, read in place.

    Raises as `Beton`, `Betons` and `Direct`.
    """
    name = str(path)
    if name.rstrip("}").endswith(".beton"):
        parts = part_paths(name) or [name]
        return Beton(parts[0], tolerate=tolerate) if len(parts) == 1 else Betons(parts, name, tolerate=tolerate)
    if os.path.isdir(path) or name.endswith((".tar", ".zip")) or name.startswith("synthetic:") or is_pattern(name):
        return Direct(path, tolerate=tolerate)
    return Beton(path, tolerate=tolerate)
