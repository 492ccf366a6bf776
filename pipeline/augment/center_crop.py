"""The center crop of evaluations, for single images."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.augment.color import IMAGENET, Statistics
from pipeline.augment.draws import center_boxes


@dataclass(frozen=True)
class CenterCrop:
    """Crops an image as evaluations do, and normalizes it.

    size: side of the result, pixels. crop_ratio: side of the crop over the image's shorter side.
    """

    size: int
    crop_ratio: float = 0.875
    statistics: Statistics = IMAGENET

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return an image, of Pillow or uint8 [H, W, 3], as float32 [3, size, size]."""
        picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
        top, left, height, width = center_boxes(np.array([picture.height]), np.array([picture.width]), self.crop_ratio)[
            0
        ]
        crop = picture.crop((left, top, left + width, top + height))
        resized = crop.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.statistics)
        return (pixels - mean) / std
