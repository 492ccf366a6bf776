"""The published augmentations, as data: the distribution of each view.

Sources: moco_v1 and moco_v2, facebookresearch/moco `main_moco.py`; moco_v3, facebookresearch/moco-v3 `main_moco.py`
(the crop scale of 0.2 is for ResNets); simclr, 2002.05709 appendix A; byol, 2006.07733 appendix B, which moco-v3 uses
for transformers; swav, 2006.09882 (facebookresearch/swav `main_swav.py`), two views and six small ones. Names ending
in `_32` are without blur, for images of 32 pixels, as in SimCLR's CIFAR-10 appendix B.9.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class View:
    """The distribution of one view, in torchvision's terms (RandomResizedCrop, ColorJitter, ...)."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's area as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio, drawn log-uniformly."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    jitter_p: float = 0.8
    """Probability of color jitter."""
    brightness: float = 0.4
    """Strength: the factor is drawn from 1 - strength to 1 + strength, like those of contrast and saturation."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """Largest shift of the hue, turns."""
    gray_p: float = 0.2
    """Probability of grayscale."""
    gray_first: bool = False
    """Grayscale before color jitter (MoCo v1) instead of after it."""
    blur_p: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, pixels."""
    solarize_p: float = 0.0
    """Probability of solarization."""
    solarize_threshold: int = 128
    """Solarization inverts levels from this on, of 0 to 255."""
    size: int | None = None
    """Side of the view, pixels; None: the run's."""


_V1 = View(jitter_p=1.0, hue=0.4, blur_p=0.0, gray_first=True)
_V2 = View()
_V3 = View(saturation=0.2, blur_p=1.0), View(saturation=0.2, blur_p=0.1, solarize_p=0.2)
_BYOL = tuple(replace(view, crop_scale=(0.08, 1.0)) for view in _V3)
_SIMCLR = View(crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)


def view_sizes(views: Sequence[View], size: int) -> tuple[int, ...]:
    """Return each view's side, pixels, in a run of side `size`."""
    return tuple(view.size or size for view in views)


def _without_blur(views: tuple[View, ...]) -> tuple[View, ...]:
    return tuple(replace(view, blur_p=0.0) for view in views)


_SWAV = tuple(
    replace(_SIMCLR, crop_scale=scale, size=size)
    for scale, size, count in (((0.14, 1.0), None, 2), ((0.05, 0.14), 96, 6))
    for _ in range(count)
)

AUGMENTATIONS: dict[str, tuple[View, ...]] = {
    "moco_v1": (_V1, _V1),
    "moco_v2": (_V2, _V2),
    "moco_v3": _V3,
    "simclr": (_SIMCLR, _SIMCLR),
    "byol": _BYOL,
    "swav": _SWAV,
}
AUGMENTATIONS |= {f"{name}_32": _without_blur(views) for name, views in AUGMENTATIONS.items() if name != "swav"}

_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("hflip", "vflip", "jitter_p", "gray_p", "blur_p", "solarize_p"), (0, 1)),
    **dict.fromkeys(("brightness", "contrast", "saturation"), (0, 10)),
    "hue": (0, 0.5),
    "solarize_threshold": (0, 256),
    "crop_scale": (0.001, 1),
    "crop_ratio": (0.01, 100),
    "blur_sigma": (0.01, 2),
}
_SHOWN_CHARACTERS = 200
VIEW_KEYS = ("preset", *(field.name for field in fields(View) if field.name in _LIMITS))
"""Keys of a view as `changed_views` takes it."""


class ViewError(ValueError):
    """A wrong view: `{key: value}: remedy`."""

    def __init__(self, key: str, value: Any, remedy: str) -> None:
        self.given, self.remedy = f"{{{key}: {value}}}"[:_SHOWN_CHARACTERS], remedy
        super().__init__(f"{self.given}: {remedy}")


def changed_views(changes: Sequence[Mapping[str, Any]], preset: str) -> tuple[View, ...]:
    """Return a view for each mapping: that of a preset, with the changes that the mapping lists.

    preset: a name in `AUGMENTATIONS`, of views without a `preset` of their own. The view at each position begins as the
    preset's view at that position. Raises ViewError for an unknown key or a value out of range.
    """
    return tuple(_changed(index, view, preset) for index, view in enumerate(changes))


def _changed(index: int, changes: Mapping[str, Any], preset: str) -> View:
    for key, value in changes.items():
        if key not in VIEW_KEYS:
            close = difflib.get_close_matches(str(key), VIEW_KEYS, n=1)
            suggestion = f", did you mean {close[0]}" if close else ""
            raise ViewError(str(key), value, f"no such key{suggestion}: choose of {', '.join(VIEW_KEYS)}")
    given = {key: value for key, value in changes.items() if value is not None}
    name = given.pop("preset", preset)
    if not isinstance(name, str) or name not in AUGMENTATIONS:
        raise ViewError("preset", name, f"choose one of {', '.join(AUGMENTATIONS)}")
    published = AUGMENTATIONS[name]
    return replace(published[index % len(published)], **{key: _checked(key, value) for key, value in given.items()})


def _checked(key: str, value: Any) -> Any:
    """Return a value in the type of its field. Raises ViewError unless it is within `_LIMITS`."""
    (low, high), default = _LIMITS[key], getattr(View, key)
    pair, whole, listed = isinstance(default, tuple), isinstance(default, int), isinstance(value, list | tuple)
    given = value if listed else [value]
    try:
        numbers = [float(number) for number in given if not isinstance(number, bool)]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    fits = listed == pair and len(numbers) == len(given) == 1 + pair and numbers == sorted(numbers)
    if not fits or not all(low <= number <= high and (number.is_integer() or not whole) for number in numbers):
        kind = "two numbers, the smaller first," if pair else "a whole number" if whole else "a number"
        raise ViewError(key, value, f"choose {kind} from {low:g} to {high:g}")
    return tuple(numbers) if pair else int(numbers[0]) if whole else numbers[0]
