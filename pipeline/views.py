"""The published augmentations, as data: the distribution of each view.

Sources: moco_v1 and moco_v2, facebookresearch/moco `main_moco.py`; moco_v3, facebookresearch/moco-v3 `main_moco.py`
(the crop scale of 0.2 is for ResNets); simclr, 2002.05709 appendix A; byol, 2006.07733 appendix B, which moco-v3 uses
for transformers; swav, 2006.09882 (facebookresearch/swav `main_swav.py`), two views and six small ones. Names ending
in `_32` are without blur, for images of 32 pixels, as in SimCLR's CIFAR-10 appendix B.9.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class View:
    """The distribution of one view, in torchvision's terms (RandomResizedCrop, ColorJitter, ...)."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's area as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio, drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of color jitter."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray: float = 0.2
    """Probability of grayscale."""
    gray_first: bool = False
    """Grayscale before color jitter (MoCo v1) instead of after it."""
    blur: float = 0.5
    """Probability of Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, pixels."""
    solarize: float = 0.0
    """Probability of solarizing at 128."""
    size: int | None = None
    """Side of the view, pixels; None: the run's."""


_V1 = View(jitter=1.0, hue=0.4, blur=0.0, gray_first=True)
_V2 = View()
_V3 = View(saturation=0.2, blur=1.0), View(saturation=0.2, blur=0.1, solarize=0.2)
_BYOL = tuple(replace(view, scale=(0.08, 1.0)) for view in _V3)
_SIMCLR = View(scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)


def view_sizes(views: Sequence[View], size: int) -> tuple[int, ...]:
    """Return each view's side, pixels, in a run of side `size`."""
    return tuple(view.size or size for view in views)


def _without_blur(views: tuple[View, ...]) -> tuple[View, ...]:
    return tuple(replace(view, blur=0.0) for view in views)


_SWAV = tuple(
    replace(_SIMCLR, scale=scale, size=size)
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
