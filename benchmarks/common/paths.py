"""The ways from a beton to two-view crops that `benchmarks.loader` compares: ours, FFCV's own, the official MoCo's.

Each is a function of (beton, size, views, batch, threads, device) that returns what runs one epoch, and the bytes that
cross from host to device for each sample.
"""

from __future__ import annotations

import io
import itertools
import random
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
from pipeline.native.libffcv import JPEG
from pipeline.sampling.order import epoch_order
from pipeline.storage.decode import records_of, rectangles
from pipeline.views import View

_AHEAD = 3
_BATCHES = 8  # at least, counted as one epoch
_VIEW = View()  # MoCo v2's


class Feed(NamedTuple):
    """One way to crops."""

    epoch: Callable[[Callable[[], None]], int]
    """Runs over the data once, calls its argument after the first batch, and returns the number of samples."""
    to_device: float
    """Bytes a sample from host to device, where there is one: by the sizes of what is copied."""
    note: str = ""
    """What else is to be known of it."""


def _plans(beton: Beton, size: int, views: int, batch: int) -> list[Plan]:
    found: list[Plan] = []
    per_epoch = len(beton) // batch
    for number in range(max(per_epoch, _BATCHES)):
        epoch, place = divmod(number, per_epoch)
        ids = epoch_order(0, epoch, len(beton))[place * batch : (place + 1) * batch]
        sides = {"heights": beton.heights[ids], "widths": beton.widths[ids]}
        drawn = draw_views([_VIEW] * views, seed=0, epoch=0, ids=ids, **sides)
        found.append(Plan.from_draws(ids, drawn, (size,) * views))
    return found


def _decoded(beton: Beton, plans: list[Plan]) -> float:
    """Return the bytes of a sample's pixels that are decoded."""
    parts = np.concatenate([rectangles(records_of(beton), plan.ids, plan.boxes) for plan in plans]).astype(np.int64)
    return float((3 * parts[:, 2] * parts[:, 3]).mean())


def _run(backend: Any, plans: list[Plan], receive: Callable[[], Any]) -> Callable[[Callable[[], None]], int]:
    def epoch(begun: Callable[[], None]) -> int:
        for plan in plans[: backend.depth]:
            backend.submit(plan)
        for number in range(len(plans)):
            receive()
            if number == 0:
                begun()
            for plan in plans[number + backend.depth : number + backend.depth + 1]:
                backend.submit(plan)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return sum(len(plan.ids) for plan in plans)

    return epoch


def ours(name: str, **more: Any) -> Callable[..., Feed]:
    """Return the way of backend `name`; draws are made beforehand, as they cost the same everywhere.

    more: of `BackendConfig`.
    """

    def make(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
        backend = build(name, beton, BackendConfig((size,) * views, batch, threads, _AHEAD, device, **more))
        plans = _plans(beton, size, views, batch)
        crops = float(3 * size * size * views)
        sent = {"ffcv": crops, "ffcv_gpu": _decoded(beton, plans), "dali": float(beton.sizes.mean()), "resident": 0.0}
        return Feed(_run(backend, plans, lambda: backend.receive(600)), sent[name])

    return make


def decode_only(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
    """What is left for the CPU where ffcv's crops are made on the GPU: each record decoded once, what is in a crop."""
    backend = build("ffcv_gpu", beton, BackendConfig((size,) * views, batch, threads, _AHEAD, torch.device("cpu")))
    plans = _plans(beton, size, views, batch)
    receive = lambda: backend.take_filled(600)  # type: ignore[attr-defined]  # noqa: E731
    return Feed(_run(backend, plans, receive), _decoded(beton, plans))


def ffcv_twice(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
    """FFCV's own Loader: a pipeline a view on one image field, each decoding and cropping."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    def spec() -> Any:
        decoder = RandomResizedCropRGBImageDecoder((size, size), scale=_VIEW.scale, ratio=_VIEW.ratio)
        return PipelineSpec("image", decoder=decoder, transforms=[])

    names = ["image", *(f"view{number}" for number in range(1, views))]
    loader = Loader(
        str(beton.path),
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        seed=0,
        batches_ahead=_AHEAD,
        pipelines={**{name: spec() for name in names}, "label": None},
    )
    return Feed(lambda begun: _count(loader, begun), float(3 * size * size * views))


def _count(batches: Iterable[Any], begun: Callable[[], None]) -> int:
    count = 0
    for given in batches:
        if count == 0:
            begun()
        count += len(given[0])
    return count


class _Official(torch.utils.data.Dataset):
    """facebookresearch/moco's `TwoCropsTransform` of its v2 augmentation, on PIL images, colors and all.

    By torchvision's transforms, where it imports; else by what they do on PIL images.
    """

    def __init__(self, beton: Beton, size: int, views: int) -> None:
        self._beton, self._size, self._views = beton, size, views
        self._transform = _torchvision(size)

    @property
    def by_torchvision(self) -> bool:
        return self._transform is not None

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
        drawn = draw_view(_VIEW, number, seed=seed, epoch=0, ids=np.array([index]), heights=height, widths=width)
        top, left, height_, width_ = (int(value) for value in drawn.boxes[0])
        box = (left, top, left + width_, top + height_)
        x = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.8:
            for operation in random.sample((_brightness, _contrast, _saturation, _hue), 4):
                x = operation(x)
        x = ImageOps.grayscale(x).convert("RGB") if random.random() < 0.2 else x
        x = _blurred(x) if random.random() < 0.5 else x
        x = ImageOps.mirror(x) if random.random() < 0.5 else x
        tensor = torch.from_numpy(np.array(x)).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        return (tensor - mean) / std


def _torchvision(size: int) -> Callable[[Image.Image], torch.Tensor] | None:
    """Return main_moco.py's transforms, or None where torchvision is not installed or does not import."""
    try:
        from torchvision import transforms as t
    except Exception:  # without torch's CUDA build its operators are missing: of several kinds
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


def _brightness(x: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(x).enhance(random.uniform(0.6, 1.4))


def _contrast(x: Image.Image) -> Image.Image:
    return ImageEnhance.Contrast(x).enhance(random.uniform(0.6, 1.4))


def _saturation(x: Image.Image) -> Image.Image:
    return ImageEnhance.Color(x).enhance(random.uniform(0.6, 1.4))


def _hue(x: Image.Image) -> Image.Image:
    h, s, v = x.convert("HSV").split()
    turned = np.array(h) + np.uint8(int(random.uniform(-0.1, 0.1) * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned, "L"), s, v)).convert("RGB")


def official(beton: Beton, size: int, views: int, batch: int, threads: int, device: torch.device) -> Feed:
    """The official MoCo pipeline: PIL transforms, colors among them, in a DataLoader (one thread: in this process)."""
    torch.set_num_threads(1)
    data = _Official(beton, size, views)
    workers = threads if threads > 1 else 0
    loader = torch.utils.data.DataLoader(data, batch, sampler=_Endless(data), num_workers=workers, drop_last=True)
    batches: Iterator[Any] = iter(loader)
    share = max(2, 200 // batch) * threads  # of an epoch: it is slow

    def some(begun: Callable[[], None]) -> int:
        return _count(itertools.islice(batches, share), begun)

    made_by = "(torchvision)" if data.by_torchvision else "(PIL)"
    return Feed(some, float(4 * 3 * size * size * views), made_by)


class _Endless(torch.utils.data.Sampler[int]):
    """Shuffled samples for ever, so that worker processes are started once."""

    def __init__(self, data: torch.utils.data.Dataset) -> None:
        self._count = len(data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self._count).tolist()


HARDWARE_LOADS = {f"dali-{load}": ours("dali", hw_decoder_load=load / 100) for load in (0, 65, 100)}
"""With other shares, in hundredths, for the GPU's JPEG decoder."""
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
