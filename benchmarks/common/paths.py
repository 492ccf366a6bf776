"""Loaders of two-view crops from a beton, compared by `benchmarks.loader`: ours, FFCV's own, the official MoCo's.

Each is a function (beton, size, views, batch, threads, device) to a `Feed`.
"""

import io
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipeline.augment.color import IMAGENET
from pipeline.augment.draws import draw_view, draw_views
from pipeline.augment.plan import Plan
from pipeline.backends import build
from pipeline.backends.base import BackendConfig
from pipeline.beton import Beton
from pipeline.beton_format import JPEG
from pipeline.sampling import order
from pipeline.storage.decode import records_of, rectangles
from pipeline.views import View

_PREFETCH = 3  # batches
_MIN_BATCHES = 8  # batches of an epoch
_STALL_SECONDS = 600
_VIEW = View()  # MoCo v2's


Transform = Callable[[Image.Image], torch.Tensor]
Epoch = Callable[[Callable[[], None]], int]
"""Loads all data once, calls its argument after the first batch, and returns the number of samples."""


class Feed(NamedTuple):
    """A loader of crops."""

    epoch: Epoch
    to_device: float
    """Bytes a sample from host to device, computed from the sizes that would be copied."""
    note: str = ""


def _plans(beton: Beton, size: int, views: int, batch: int) -> list[Plan]:
    plans: list[Plan] = []
    per_epoch = len(beton) // batch
    for number in range(max(per_epoch, _MIN_BATCHES)):
        epoch, index = divmod(number, per_epoch)
        ids = order.ids("random", 0, epoch, len(beton), index * batch + np.arange(batch))
        sides = {"heights": beton.heights[ids], "widths": beton.widths[ids]}
        draws = draw_views([_VIEW] * views, seed=0, epoch=0, ids=ids, **sides)
        plans.append(Plan.from_draws(ids, draws, (size,) * views))
    return plans


def _decoded(beton: Beton, plans: list[Plan]) -> float:
    """Return the bytes of decoded pixels a sample."""
    parts = np.concatenate([rectangles(records_of(beton, plan.ids), plan.boxes) for plan in plans]).astype(np.int64)
    return float((3 * parts[:, 2] * parts[:, 3]).mean())


def _epoch(backend: Any, plans: list[Plan], receive: Callable[[float], Any]) -> Epoch:
    def epoch(first_batch: Callable[[], None]) -> int:
        for plan in plans[: backend.depth]:
            backend.submit(plan)
        for number in range(len(plans)):
            receive(_STALL_SECONDS)
            if number == 0:
                first_batch()
            for plan in plans[number + backend.depth : number + backend.depth + 1]:
                backend.submit(plan)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return sum(len(plan.ids) for plan in plans)

    return epoch


def ours(name: str, **options: Any) -> Callable[..., Feed]:
    """Return the loader by backend `name`, with more `options` of `BackendConfig`.

    Draws are made in advance: they cost the same in every backend.
    """

    def make(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
        backend = build(name, beton, BackendConfig((size,) * views, batch, threads, _PREFETCH, device, **options))
        plans = _plans(beton, size, views, batch)
        crops = float(3 * size * size * views)
        sent = {"ffcv": crops, "ffcv_gpu": _decoded(beton, plans), "dali": float(beton.sizes.mean()), "resident": 0.0}
        return Feed(_epoch(backend, plans, backend.receive), sent[name])

    return make


def decode_only(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
    """The CPU's part of ffcv_gpu: decodes each record once, and of it the pixels of its crops."""
    config = BackendConfig((size,) * views, batch, threads, _PREFETCH, torch.device("cpu"))
    backend = build("ffcv_gpu", beton, config)
    plans = _plans(beton, size, views, batch)
    return Feed(_epoch(backend, plans, backend.wait), _decoded(beton, plans))


def ffcv_twice(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
    """FFCV's own Loader: one pipeline for each view on one image field; each decodes and crops."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    def spec() -> Any:
        decoder = RandomResizedCropRGBImageDecoder((size, size), scale=_VIEW.crop_scale, ratio=_VIEW.crop_ratio)
        return PipelineSpec("image", decoder=decoder, transforms=[])

    names = ["image", *(f"view{number}" for number in range(1, views))]
    loader = Loader(
        str(beton.path),
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        seed=0,
        batches_ahead=_PREFETCH,
        pipelines={**{name: spec() for name in names}, "label": None},
    )
    return Feed(lambda first_batch: _count(loader, first_batch), float(3 * size * size * views))


def _count(batches: Iterable[Any], first_batch: Callable[[], None]) -> int:
    count = 0
    for batch in batches:
        if count == 0:
            first_batch()
        count += len(batch[0])
    return count


class _Official(torch.utils.data.Dataset):
    """facebookresearch/moco's `TwoCropsTransform` of its v2 augmentation on PIL images, including colors.

    transform: torchvision's; None: the same operations of PIL.
    """

    def __init__(self, beton: Beton, size: int, views: int, transform: Transform | None) -> None:
        self._beton, self._size, self._views, self._transform = beton, size, views, transform

    def __len__(self) -> int:
        return len(self._beton)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        beton, record = self._beton, self._beton.record(index).tobytes()
        if beton.modes[index] == JPEG:
            image = Image.open(io.BytesIO(record)).convert("RGB")
        else:
            image = Image.frombytes("RGB", (int(beton.widths[index]), int(beton.heights[index])), record)
        if self._transform is not None:
            return [self._transform(image) for _ in range(self._views)]
        return [self._view(image, index, number) for number in range(self._views)]

    def _view(self, image: Image.Image, index: int, number: int) -> torch.Tensor:
        height, width = np.array([image.height]), np.array([image.width])
        seed = random.getrandbits(31)
        draws = draw_view(_VIEW, number, seed=seed, epoch=0, ids=np.array([index]), heights=height, widths=width)
        top, left, crop_height, crop_width = (int(value) for value in draws.boxes[0])
        box = (left, top, left + crop_width, top + crop_height)
        x = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.8:
            for operation in random.sample(_JITTER, 4):
                x = operation(x)
        x = ImageOps.grayscale(x).convert("RGB") if random.random() < 0.2 else x
        x = _blurred(x) if random.random() < 0.5 else x
        x = ImageOps.mirror(x) if random.random() < 0.5 else x
        tensor = torch.from_numpy(np.array(x)).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        return (tensor - mean) / std


def _torchvision(size: int) -> Transform | None:
    """Return main_moco.py's transforms, or None if torchvision does not import."""
    try:
        from torchvision import transforms as t
    except Exception:  # several kinds: a build for another torch lacks its operators
        return None
    return t.Compose(
        [
            t.RandomResizedCrop(size, scale=(0.2, 1.0)),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([_blurred], p=0.5),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
            t.Normalize(mean=IMAGENET.mean, std=IMAGENET.std),
        ]
    )


def _blurred(x: Image.Image) -> Image.Image:
    return x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def _enhanced(enhance: Callable[[Image.Image], Any]) -> Callable[[Image.Image], Image.Image]:
    return lambda x: enhance(x).enhance(random.uniform(0.6, 1.4))


def _hue(x: Image.Image) -> Image.Image:
    h, s, v = x.convert("HSV").split()
    shifted = np.array(h) + np.uint8(int(random.uniform(-0.1, 0.1) * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(shifted, "L"), s, v)).convert("RGB")


_JITTER = (*map(_enhanced, (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)), _hue)


def official(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
    """The official MoCo pipeline: PIL transforms in a DataLoader (with one thread in this process)."""
    torch.set_num_threads(1)
    transform = _torchvision(size)
    data = _Official(beton, size, views, transform)
    endless = torch.utils.data.RandomSampler(data, num_samples=sys.maxsize)  # worker processes start once
    workers = threads if threads > 1 else 0
    loader = torch.utils.data.DataLoader(data, batch, sampler=endless, num_workers=workers, drop_last=True)
    batches: Iterator[Any] = iter(loader)
    batches_an_epoch = max(2, 200 // batch) * threads  # a part of the data, as it is slow

    def epoch(first_batch: Callable[[], None]) -> int:
        return _count(itertools.islice(batches, batches_an_epoch), first_batch)

    return Feed(epoch, float(4 * 3 * size * size * views), "(torchvision)" if transform else "(PIL)")


HARDWARE_LOADS = {f"dali-{load}": ours("dali", hw_decoder_load=load / 100) for load in (0, 65, 100)}
"""DALI with other shares of the GPU's JPEG decoder, in percent."""
COMPARED: dict[str, Callable[..., Feed]] = {
    "ffcv": ours("ffcv"),
    "ffcv-gpu": ours("ffcv_gpu"),
    "decode-only": decode_only,
    "dali": ours("dali"),
    "resident": ours("resident"),
    "ffcv-twice": ffcv_twice,
    "official": official,
}
PATHS = COMPARED | HARDWARE_LOADS
