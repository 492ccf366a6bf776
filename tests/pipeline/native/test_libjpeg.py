"""Tests of jpeg.c: Pillow's pixels for every kind of JPEG, and no harm from damaged ones."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import Beton
from pipeline.native.libjpeg import decode_rectangle
from pipeline.prepare import prepare
from pipeline.storage.encode import Settings
from tests import ROOT
from tests.pipeline.conftest import pack, picture, saved

BUILT = pytest.mark.skipif(decode_rectangle is None, reason="built without libjpeg-turbo's headers")
pytestmark = BUILT

KINDS = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "optimized": {"optimize": True, "quality": 98},
}


def noisy(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture with detail in every block."""
    smooth = np.asarray(picture(width, height, seed), np.int16)
    return Image.fromarray(
        (smooth + np.random.default_rng(seed).integers(-30, 30, smooth.shape)).clip(0, 255).astype("u1")
    )


def part(data: bytes, sides: tuple[int, int], box: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """Return status and pixels of a rectangle; check that the memory after it is unchanged."""
    source, size = np.frombuffer(data, np.uint8), 3 * box[2] * box[3]
    out = np.full(size + 64, 77, np.uint8)
    status = decode_rectangle(source.ctypes.data, len(data), *sides, *box, out.ctypes.data)
    assert (out[size:] == 77).all()
    return status, out[:size].reshape(box[2], box[3], 3)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("gray", [False, True], ids=["RGB", "gray"])
def test_a_rectangle_equals_pillow(options: dict[str, object], gray: bool) -> None:
    rng = np.random.default_rng(0)
    for seed, (width, height) in enumerate([(97, 61), (160, 128), (33, 200), (7, 5), (1, 1)]):
        image = noisy(width, height, seed)
        data = saved(image.convert("L") if gray else image, **({} if gray else options))
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for _ in range(20):
            top, left = int(rng.integers(height)), int(rng.integers(width))
            left = left // 16 * 16 if rng.random() < 0.5 else min(left, max(width - 5, 0))
            columns = int(rng.integers(min(5, width - left), width - left + 1))
            box = top, left, int(rng.integers(1, height - top + 1)), columns
            status, pixels = part(data, (height, width), box)
            assert status == 0
            exact = slice(left > 0, box[3] - (left + box[3] < width))  # except the columns at its edges
            np.testing.assert_array_equal(
                pixels[:, exact], expected[top : top + box[2], left : left + box[3]][:, exact]
            )


def test_invalid_jpegs_return_an_error() -> None:
    data = saved(noisy(64, 48))
    assert part(data, (48, 64), (0, 0, 48, 64))[0] == 0
    assert part(data, (48, 65), (0, 0, 48, 64))[0] != 0
    assert part(data[:-2], (48, 64), (0, 0, 48, 64))[0] != 0
    assert part(data[: len(data) // 2], (48, 64), (40, 0, 8, 64))[0] != 0
    assert part(b"", (48, 64), (0, 0, 8, 8))[0] != 0
    assert part(saved(picture(), "png"), (24, 40), (0, 0, 8, 8))[0] != 0
    assert part(saved(picture().convert("CMYK")), (24, 40), (0, 0, 8, 8))[0] != 0


def test_random_damage_does_no_harm() -> None:
    rng, seen = np.random.default_rng(0), set()
    files = [np.frombuffer(saved(noisy(97, 61), **options), np.uint8) for options in KINDS.values()]
    for _ in range(300):
        data = files[rng.integers(len(files))].copy()
        data[rng.integers(len(data), size=rng.integers(1, 8))] = rng.integers(0, 256)
        seen.add(part(data.tobytes(), (61, 97), (13, 17, 31, 40))[0])
    assert seen == {0, 1}


def small_beton(folder: Path, settings: Settings) -> Beton:
    source = pack("folder", {f"a/{i}.jpeg": saved(noisy(97, 61, i)) for i in range(4)}, folder)
    prepare(str(source), folder / "x.beton", settings, workers=1, quiet=True)
    return Beton(folder / "x.beton")


BOXES = np.array([[[5, 27, 10, 20]] * 4, [[12, 23, 30, 9]] * 4], np.int32)


WITHOUT = """
import sys
sys.modules["pipeline.native._jpeg"] = None
import numpy as np, torch
from pipeline.augment.plan import Plan
from pipeline.backends.base import BackendConfig
from pipeline.backends import build
from pipeline.beton import Beton
from pipeline.native.libjpeg import decode_rectangle

assert decode_rectangle is None
boxes = np.array([[[5, 27, 10, 20]] * 4, [[12, 23, 30, 9]] * 4], np.int32)
for name in ("ffcv", "ffcv_gpu", "resident"):
    backend = build(name, Beton(sys.argv[1]), BackendConfig((16, 16), 4, 1, 1, torch.device("cpu")))
    backend.submit(Plan(np.arange(4), boxes, np.zeros((2, 4), np.uint8), (16, 16)))
    np.save(sys.argv[1] + "." + name, torch.stack(backend.receive(60)).numpy())
"""


@pytest.mark.slow
def test_without_jpeg_c_ffcvs_decoder_is_used(tmp_path: Path) -> None:
    beton = small_beton(tmp_path, Settings())
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", WITHOUT, str(beton.path)], check=True, timeout=120, env=environment)
    for name in ("ffcv", "ffcv_gpu", "resident"):
        views = np.load(f"{beton.path}.{name}.npy")
        for view, boxes in zip(views, BOXES, strict=True):
            for index, (top, left, height, width) in enumerate(boxes.tolist()):
                image = Image.open(io.BytesIO(beton.record(index).tobytes()))
                crop = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BILINEAR)
                assert np.abs(np.asarray(crop, int) - view[index]).mean() < 2
