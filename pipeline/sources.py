"""Where images come from: a folder, a tar, ILSVRC2012's tar of tars, a zip, or drawn ones. Nothing is unpacked.

`open_source` lists the images of a source; each is an `Item` that any process can read on its own (a range of bytes in
a file, a member of a zip, or a number to draw). Classes are the folders the images stand in, in sorted order; images
that stand in no folder are unlabelled.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pipeline import synthetic
from pipeline.errors import InputError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
SUBSETS = frozenset({"train", "val", "valid", "validation", "test", "extra", "unlabeled", "unlabelled"})
_SYNTHETIC_SEED = 0


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    name: str
    """Its path inside the source."""
    label: int
    """-1 where there is none."""
    path: str
    """The file that holds it; empty for a drawn image."""
    offset: int = -1
    """Bytes into `path`; -1 for a zip member or a whole file. The number of a drawn image."""
    size: int = 0

    def read(self) -> bytes:
        """Return the image file's bytes."""
        if not self.path:
            return synthetic.jpeg(_SYNTHETIC_SEED, self.offset)[0]
        if self.offset >= 0:
            with open(self.path, "rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        if self.path.endswith(".zip"):
            return _open_zip(self.path).read(self.name)
        return Path(self.path).read_bytes()


@dataclass(frozen=True)
class Source:
    """The images of a source, in a fixed order, and its class names by label."""

    items: list[Item]
    classes: list[str]


@lru_cache(maxsize=4)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def open_source(source: str, subset: str | None = None) -> Source:
    """List the images of `source`: a folder, .tar, .zip or `synthetic:N`, or `synthetic:FIRST:N`.

    subset: take only what stands in this folder of the source. Raises InputError, with the remedy, where there is no
    such source, no image in it, or several subsets to choose from.
    """
    if source.startswith("synthetic:"):
        return _drawn(source)
    path = Path(source)
    if path.is_dir():
        found = _walk(path)
    elif not path.is_file():
        raise InputError(f"{source}: no such file or folder: give an image folder, a .tar, a .zip or synthetic:N")
    elif path.suffix == ".zip":
        found = _zip_members(path)
    elif path.suffix == ".tar":
        found = _tar_members(path)
    else:
        raise InputError(f"{source}: not a folder, .tar or .zip: unpack it, or decompress it to a plain .tar")
    return _label(source, found, subset)


def _drawn(source: str) -> Source:
    numbers = source.split(":")[1:]
    if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() for number in numbers) or int(numbers[-1]) < 1:
        raise InputError(f"{source}: write synthetic:N, N images, or synthetic:FIRST:N, those from number FIRST on")
    first = int(numbers[0]) if len(numbers) == 2 else 0
    indices = range(first, first + int(numbers[-1]))
    items = [Item(f"drawn/{i:08d}.jpg", i % len(synthetic.CLASSES), "", i) for i in indices]
    return Source(items, list(synthetic.CLASSES))


def _walk(root: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield (name inside the source, file, offset, size) of each file."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for file in files:
            path = Path(folder) / file
            yield path.relative_to(root).as_posix(), str(path), -1, 0


def _zip_members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    try:
        members = _open_zip(str(path)).infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: not a whole zip file ({error}): fetch it again") from None
    for member in members:
        if not member.is_dir():
            yield member.filename, str(path), -1, member.file_size


def _tar_members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield the files of a tar; a tar inside it is a class folder, read in place (ILSVRC2012_img_train.tar)."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if not member.name.endswith(".tar"):
                    yield member.name, str(path), member.offset_data, member.size
                    continue
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                    folder = member.name.removesuffix(".tar")
                    for image in inner:
                        if image.isfile():
                            yield (
                                f"{folder}/{image.name}",
                                str(path),
                                member.offset_data + image.offset_data,
                                image.size,
                            )
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path}: not a whole, uncompressed tar file ({error}): fetch it again or decompress it"
        ) from None


def _label(source: str, found: Iterable[tuple[str, str, int, int]], subset: str | None) -> Source:
    files = [(name.removeprefix("./"), path, offset, size) for name, path, offset, size in found]
    files = [file for file in files if PurePosixPath(file[0]).suffix.lower() in SUFFIXES and not _hidden(file[0])]
    parents = {PurePosixPath(name).parent.parts for name, *_ in files}
    root = _root(source, parents, subset)
    files = sorted(file for file in files if PurePosixPath(file[0]).parts[: len(root)] == root)
    if not files:
        where = f"{source}, folder {subset}" if subset else source
        raise InputError(
            f"{where}: no image in it: give a folder or archive with {', '.join(sorted(SUFFIXES)[:4])} ... files"
        )
    folders = [PurePosixPath(name).parts[len(root) : -1] for name, *_ in files]
    classes = sorted({folder[0] for folder in folders if folder})
    number = {name: label for label, name in enumerate(classes)}
    items = [
        Item(name, number[folder[0]] if folder else -1, path, offset, size)
        for (name, path, offset, size), folder in zip(files, folders, strict=True)
    ]
    return Source(items, classes)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _root(source: str, parents: set[tuple[str, ...]], subset: str | None) -> tuple[str, ...]:
    """Return the folder whose children are the classes: the subset's, or that which all images share."""
    root: tuple[str, ...] = ()
    while parents and all(len(p) > len(root) + 1 for p in parents) and len({p[len(root)] for p in parents}) == 1:
        root += (next(iter(parents))[len(root)],)  # a single folder around all class folders
    tops = {p[len(root)] for p in parents if len(p) > len(root)}
    if subset is not None:
        if root and root[-1] == subset:
            return root
        if subset not in tops:
            have = ", ".join(sorted(tops)[:5]) or "no folder"
            raise InputError(f"{source}: no folder {subset!r} in it: it has {have}; choose --subset from these")
        return (*root, subset)
    if len(tops) > 1 and tops <= SUBSETS:
        raise InputError(f"{source}: holds {', '.join(sorted(tops))}: choose one of them with --subset")
    return root
