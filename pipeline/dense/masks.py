"""Images with masks of class numbers, from PASCAL VOC's layout or from two folders, `images/` and `masks/`.

A mask is a PNG of the image's size, of palette indices (as VOC's) or gray levels; 255 is ignored in training and in
scores. Betons cannot contain masks: PIL reads the files one by one.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.dense.image_files import open_image, read_set
from pipeline.system.errors import InputError
from pipeline.system.thread_pool import Workers

IGNORED = 255
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MASK_MODES = ("P", "L", "1")
_HELD_OUT = 10  # every tenth image
_MASKS_AHEAD = 64  # under way at once, at most
Pair = tuple[Image.Image, np.ndarray]


@dataclass(frozen=True)
class Masked:
    """Images with masks, sorted by name."""

    path: Path
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    shapes: np.ndarray
    """int64 [N, 2]: height and width, pixels, from the files' headers."""
    fingerprint: str
    """A hash of names and sizes of all files."""

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pair:
        """Return an image, RGB, and its mask, uint8 [H, W]. Raises InputError where one cannot be decoded."""
        return open_image(self.images[index]).convert("RGB"), self.mask(index)

    def mask(self, index: int) -> np.ndarray:
        """Return a mask of class numbers, uint8 [H, W]. Raises InputError where it cannot be decoded."""
        return np.asarray(open_image(self.masks[index])).astype(np.uint8)

    def part(self, indices: Iterable[int]) -> "Masked":
        """Return a part of the images."""
        chosen = list(indices)
        images, masks = (tuple(files[index] for index in chosen) for files in (self.images, self.masks))
        fingerprint = hashlib.sha256(f"{self.fingerprint} {chosen}".encode()).hexdigest()
        return replace(self, images=images, masks=masks, shapes=self.shapes[chosen], fingerprint=fingerprint)

    def held_out(self) -> "tuple[Masked, Masked]":
        """Return nine tenths of the images for training, and every tenth from the first on for testing."""
        if len(self) < 2:
            raise InputError(f"{self.path}: {len(self)} images are too few to test on every tenth: give --test")
        numbers = range(len(self))
        return self.part(i for i in numbers if i % _HELD_OUT), self.part(range(0, len(self), _HELD_OUT))


def is_voc(path: Path) -> bool:
    """Return whether a folder has VOC's layout."""
    return (path / "JPEGImages").is_dir()


def open_masked(path: Path, which: str = "train", masks: str = "SegmentationClass") -> Masked:
    """Return the images and masks in a folder.

    which: in VOC's layout, the set `ImageSets/Segmentation/WHICH.txt`. masks: the folder of masks there.
    Raises InputError where a file is missing, or an image and its mask do not match by their headers.
    """
    images, mask_files = _voc_files(path, which, masks) if is_voc(path) else _folder_files(path)
    shapes, digest = [], hashlib.sha256()
    for image, mask in zip(images, mask_files, strict=True):
        shapes.append(_shape(image, mask))
        digest.update(f"{image.name} {image.stat().st_size} {mask.stat().st_size}\n".encode())
    return Masked(path, tuple(images), tuple(mask_files), np.array(shapes, np.int64), digest.hexdigest())


def _voc_files(path: Path, which: str, folder: str) -> tuple[list[Path], list[Path]]:
    """Return images and masks of a set. Its lines have a name each, or two paths as in the augmented set."""
    listed = path / "ImageSets" / "Segmentation" / f"{which}.txt"
    names = sorted({PurePosixPath(word).stem for word in read_set(listed, "name one of them")})
    if not names:
        raise InputError(f"{listed}: names no image: name another set")
    images = [path / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [path / folder / f"{name}.png" for name in names]
    for kind, files in (("images", images), ("masks", masks)):
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: is missing, and {len(missing) - 1} other {kind} that {listed} names: unpack the data "
                "again, or name another set or folder of masks"
            )
    return images, masks


def _folder_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of `images/` and `masks/`, which must have the same names."""
    folders = [path / "images", path / "masks"]
    if not all(folder.is_dir() for folder in folders):
        raise InputError(
            f"{path}: has neither VOC's layout (JPEGImages, SegmentationClass, ImageSets) nor folders images and "
            "masks: give a folder with one of them"
        )
    images, masks = _by_name(folders[0], _IMAGE_SUFFIXES), _by_name(folders[1], (".png",))
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        name = alone[0]
        file, other = (images[name], folders[1]) if name in images else (masks[name], folders[0])
        raise InputError(f"{file}: has no counterpart in {other}, like {len(alone) - 1} others: add or remove them")
    if not images:
        raise InputError(f"{path}: no images in it: give a folder with images and masks")
    names = sorted(images)
    return [images[name] for name in names], [masks[name] for name in names]


def _by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files with one of the suffixes, by their names without it."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in suffixes:
            if file.stem in files:
                raise InputError(f"{file}: has the name of {files[file.stem]}: rename or remove one of them")
            files[file.stem] = file
    return files


def _shape(image: Path, mask: Path) -> tuple[int, int]:
    """Return height and width of an image. Raises InputError if its mask's differ, or it is not a mask."""
    image_header, mask_header = open_image(image, pixels=False), open_image(mask, pixels=False)
    if mask_header.mode not in _MASK_MODES:
        raise InputError(
            f"{mask}: is {mask_header.mode}, not class numbers: save it as an 8-bit PNG of palette indices or gray "
            "levels"
        )
    if image_header.size != mask_header.size:
        raise InputError(
            f"{mask}: {mask_header.width} x {mask_header.height} pixels, but {image} has {image_header.width} x "
            f"{image_header.height}: give the mask that was drawn on it"
        )
    return image_header.height, image_header.width


def classes_in(data: Masked, indices: Iterable[int], classes: int, workers: Workers) -> set[int]:
    """Decode the masks `indices`; return the class numbers in them.

    classes: number of classes, 0 for any. Raises InputError for a mask that cannot be decoded or has a larger number.
    """
    indices, occurring = list(indices), set[int]()

    def numbers_in(_: None, index: int) -> set[int]:
        return set(np.unique(data.mask(index)).tolist()) - {IGNORED}

    for index, numbers in zip(indices, workers.in_order(numbers_in, indices, ahead=_MASKS_AHEAD), strict=True):
        if classes and max(numbers, default=0) >= classes:
            raise InputError(
                f"{data.masks[index]}: has class {max(numbers)}, and there are {classes}, 0 to {classes - 1}, except "
                f"{IGNORED}: mend it, or give other --classes"
            )
        occurring |= numbers
    return occurring
