"""Files of images with masks or boxes: their headers, their pixels, and VOC's lists of their names."""

from pathlib import Path

from PIL import Image

from pipeline.system.errors import InputError


def open_image(file: Path, *, pixels: bool = True) -> Image.Image:
    """Return an image; without `pixels`, only its size and mode. Raises InputError where it cannot be read."""
    try:
        with Image.open(file) as image:
            if pixels:
                image.load()
            return image
    except Exception as error:  # any kind: PIL's readers fail on damaged files in many ways
        action = "decoded" if pixels else "read"
        raise InputError(f"{file}: cannot be {action} ({error}): replace it, or leave it out") from None


def read_set(file: Path, remedy: str) -> list[str]:
    """Return the first word of each line of a set in VOC's `ImageSets/*/`. Raises InputError if it cannot be read."""
    try:
        return [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        names = sorted(path.stem for path in file.parent.glob("*.txt"))
        if file.parent.name == "Main":  # which also has sets of each class, such as cat_train
            names = [name for name in names if "_" not in name]
        sets = ", ".join(names) or "none"
        raise InputError(f"{file}: cannot be read ({error}): the sets are {sets}: {remedy}") from None
