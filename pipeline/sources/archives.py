"""Sources of images: a folder, a tar, ILSVRC2012's tar of tars, a zip, or synthetic ones. Nothing is unpacked.

`open_source` lists the images of a source. Each is an `Item` that any process can read alone: a range of bytes in a
file, a member of a zip, or a number to draw. Classes are the images' folders in sorted order; images in no folder are
unlabeled.
"""

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pipeline.sources import synthetic, tar_headers
from pipeline.sources.listing import Listing, ListingWriter
from pipeline.sources.tar_headers import TarPart
from pipeline.system.errors import InputError
from pipeline.system.limits import MAX_FILE_BYTES, MAX_FILES, open_regular

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
SUBSETS = frozenset({"train", "val", "valid", "validation", "test", "extra", "unlabeled"})
_SYNTHETIC_SEED = 0
_ZIP_HEADER_BYTES = 30  # before the name in a zip member's header
_MAX_ZIP_RATIO = 200  # ratio of the images' uncompressed bytes to the zip's
_MAX_NAME_BYTES = 512


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    name: str
    """Path inside the source."""
    path: str
    """File that contains it; empty for a synthetic image."""
    label: int = -1
    """-1 for none."""
    offset: int = -1
    """First byte in `path`, of a zip member's header; -1 if the image is the file. The number of a synthetic image."""
    size: int = 0
    """Bytes, compressed."""
    method: int = -1
    """Compression of a zip member; -1 outside a zip."""
    crc32: int = 0
    """CRC32 of a zip member, uncompressed."""
    expanded: int = 0
    """Bytes of a zip member, uncompressed."""

    def read(self) -> bytes:
        """Return the image file's bytes. Raises OSError, also for more than `MAX_FILE_BYTES`."""
        if not self.path:
            return synthetic.jpeg(_SYNTHETIC_SEED, self.offset)
        with open_regular(self.path) as file:
            size = self.size if self.offset >= 0 else os.fstat(file.fileno()).st_size
            if max(size, self.expanded) > MAX_FILE_BYTES:
                raise OSError(f"{max(size, self.expanded)} bytes, more than {MAX_FILE_BYTES}")
            if self.method < 0:
                return os.pread(file.fileno(), size, max(self.offset, 0))
            return self._unzip(file.fileno())

    def _unzip(self, file: int) -> bytes:
        # Without zipfile: forked processes would share its file position, and each would load the zip's directory.
        header = os.pread(file, _ZIP_HEADER_BYTES, self.offset)  # ends with the lengths of name and extra field
        skip = len(header) + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(file, self.size, self.offset + skip)
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.expanded + 1)
            except zlib.error as error:
                raise OSError(f"damaged in the zip ({error})") from None
        if len(data) != self.expanded or zlib.crc32(data) != self.crc32:
            raise OSError("damaged in the zip (its size or CRC32 differs)")
        return data


@dataclass(frozen=True)
class Source:
    """The images of a source, in a fixed order, and its class names by label."""

    items: Sequence[Item]
    classes: list[str]

    def relabeled(self, labels: Iterable[int], classes: list[str]) -> "Source":
        """Return the same images with other labels and class names."""
        if isinstance(self.items, Listing):
            return Source(self.items.relabeled(labels), classes)
        return Source([replace(item, label=label) for item, label in zip(self.items, labels, strict=True)], classes)


def open_source(source: str, subset: str | None = None, folder: Path | None = None) -> Source:
    """List the images of `source`: a folder, .tar, .zip or `synthetic:N`, or `synthetic:FIRST:N`.

    subset: take only the images in this folder of the source. folder: for temporary files. Raises InputError for a
    source that is missing or has no image, and for several subsets to choose from.
    """
    if source.startswith("synthetic:"):
        return _synthetic(source, folder)
    path = Path(source)
    if os.path.isdir(path):
        items = _walk(path)
    elif not os.path.isfile(path):
        raise InputError(f"{source}: no such file or folder: give an image folder, a .tar, a .zip or synthetic:N")
    elif path.suffix == ".zip":
        items = _zip_members(path)
    elif path.suffix == ".tar":
        items = _tar_members(path)
    else:
        raise InputError(f"{source}: not a folder, .tar or .zip: unpack it, or decompress it to a plain .tar")
    return _label(source, items, subset, folder)


def _synthetic(source: str, folder: Path | None) -> Source:
    numbers = source.split(":")[1:]
    if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() for number in numbers) or int(numbers[-1]) < 1:
        raise InputError(f"{source}: write synthetic:N, N images, or synthetic:FIRST:N, those from number FIRST on")
    first = int(numbers[0]) if len(numbers) == 2 else 0
    indices = range(first, first + int(numbers[-1]))
    writer = ListingWriter(folder)
    for i in indices:
        writer.append(Item(f"drawn/{i:08d}.jpg", "", offset=i), i % len(synthetic.CLASSES))
    return Source(writer.finish(), list(synthetic.CLASSES))


def _walk(root: Path) -> Iterator[Item]:
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders.sort()
        for inner in folders:
            path = Path(folder, inner)
            if path.is_symlink() and Path(folder).resolve().is_relative_to(path.resolve()):
                raise InputError(f"{path}: is a link to a folder that it is in: remove it")
        for file in files:
            path = Path(folder, file)
            yield Item(path.relative_to(root).as_posix(), str(path))


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror}): make the folder readable") from None


def _zip_members(path: Path) -> Iterator[Item]:
    try:
        with zipfile.ZipFile(path) as archive:
            members, end = [m for m in archive.infolist() if not m.filename.endswith("/")], archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, MemoryError, struct.error) as error:
        raise InputError(f"{path}: not an intact zip file ({error}): fetch it again") from None
    _refuse_bomb(path, members, end)
    for member in members:
        method = member.compress_type
        if member.flag_bits & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: {member.filename} is encrypted or not deflated: unpack it and give the folder")
        yield Item(
            _plain(member.filename, path),
            str(path),
            offset=member.header_offset,
            size=member.compress_size,
            method=method,
            crc32=member.CRC,
            expanded=member.file_size,
        )


def _refuse_bomb(path: Path, members: list[zipfile.ZipInfo], end: int) -> None:
    """Raise InputError where members overlap, or images are far larger than the zip, whose members end at `end`."""
    total = sum(member.file_size for member in members if _is_image(member.filename))
    if total > _MAX_ZIP_RATIO * end + MAX_FILE_BYTES:
        raise InputError(f"{path}: {total} bytes of images in {end}, more than {_MAX_ZIP_RATIO} times as many: a bomb")
    members = sorted(members, key=lambda member: member.header_offset)
    for member, start in zip(members, [*(after.header_offset for after in members[1:]), end], strict=False):
        if member.header_offset + _ZIP_HEADER_BYTES + member.compress_size > start:
            raise InputError(f"{path}: {member.filename} overlaps the next member: fetch the zip again")


def _tar_members(path: Path) -> Iterator[Item]:
    """Yield the files of a tar; a tar inside it is a class folder, read in place (ILSVRC2012_img_train.tar)."""
    for item in tar_files(path):
        if item.name.endswith(".tar"):
            yield from tar_files(path, item.offset, item.size, item.name.removesuffix(".tar") + "/")
        else:
            yield item


def tar_files(path: Path | str, start: int = 0, size: int | None = None, folder: str = "") -> Iterator[Item]:
    """Yield the files of a tar, or of a tar inside it at those bytes. Raises InputError for a damaged one.

    folder: goes before the names.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size if size is None else size
            for name, offset, length in tar_headers.files(TarPart(file.fileno(), start, size)):
                yield Item(folder + _plain(name, path), str(path), offset=start + offset, size=length)
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not an intact, uncompressed tar file ({error}): fetch it again or decompress it"
        ) from None


def _plain(name: str, path: Path | str) -> str:
    """Return the name of an archive's member. Raises InputError for a name that leads out of a folder."""
    name = name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise InputError(
            f"{path}: has a member {name[:_MAX_NAME_BYTES]!r}: pack it again, with names inside one folder"
        )
    return name


def _label(source: str, items: Iterable[Item], subset: str | None, folder: Path | None) -> Source:
    """Return the images among the items, sorted by name, with their folders as classes."""
    writer, numbers, parents = ListingWriter(folder), dict[str, int](), list[tuple[str, ...]]()
    for item in _checked(source, items):
        parent, _, name = item.name.rpartition("/")
        if _is_hidden(name) or os.path.splitext(name)[1].lower() not in SUFFIXES:
            continue
        number = numbers.get(parent)
        if number is None:
            parts = PurePosixPath(parent).parts
            number = numbers[parent] = -1 if any(map(_is_hidden, parts)) else len(parents)
            parents += [parts] if number >= 0 else []
        if number >= 0:
            writer.append(item, number)
    root = _root(source, set(parents), subset)
    folders = [parts[len(root) :] if parts[: len(root)] == root else None for parts in parents]
    classes = sorted({parts[0] for parts in folders if parts})
    label = {name: number for number, name in enumerate(classes)}
    labels = [label[parts[0]] if parts else -1 for parts in folders]
    images = writer.finish(labels, kept=[parts is not None for parts in folders], by_name=True)
    if not images:
        where = f"{source}, folder {subset}" if subset else source
        raise InputError(
            f"{where}: no image in it: give a folder or archive with {', '.join(sorted(SUFFIXES)[:4])} ... files"
        )
    return Source(images, classes)


def _checked(source: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items. Raises InputError for too many, or too long a name."""
    for number, item in enumerate(items):
        if number == MAX_FILES:
            raise InputError(f"{source}: more than {MAX_FILES} files: split it")
        if len(os.fsencode(item.name)) > _MAX_NAME_BYTES:
            raise InputError(
                f"{source}: the name {item.name[:40]}... has more than {_MAX_NAME_BYTES} bytes: shorten it"
            )
        yield item


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(map(_is_hidden, path.parts))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _root(source: str, parents: set[tuple[str, ...]], subset: str | None) -> tuple[str, ...]:
    """Return the folder that contains the class folders: the subset, or the folder that all images share."""
    root: tuple[str, ...] = ()
    while parents and all(len(p) > len(root) + 1 for p in parents) and len({p[len(root)] for p in parents}) == 1:
        root += (next(iter(parents))[len(root)],)  # one folder around all others
    tops = {p[len(root)] for p in parents if len(p) > len(root)}
    if subset is not None:
        if root and root[-1] == subset:
            return root
        if subset not in tops:
            names = ", ".join(sorted(tops)[:5]) or "no folder"
            raise InputError(f"{source}: no folder {subset!r} in it: it has {names}; choose --subset from these")
        return (*root, subset)
    if len(tops) > 1 and tops <= SUBSETS:
        raise InputError(f"{source}: has {', '.join(sorted(tops))}: choose one of them with --subset")
    return root
