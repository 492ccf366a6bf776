"""Tests over all backends: the same views bit for bit, resuming from any batch, the same failures."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipeline.augment.color import Statistics
from pipeline.augment.draws import draw_view
from pipeline.augment.plan import Plan
from pipeline.backends import BACKENDS, ffcv_gpu, resident, select_backend
from pipeline.backends.base import BackendConfig
from pipeline.backends.select_backend import choose, decoding_rate
from pipeline.beton import Beton
from pipeline.beton_format import JPEG, RAW
from pipeline.loader import Batch, CenterLoader, Loader
from pipeline.native.libjpeg import decode_rectangle
from pipeline.prepare import prepare
from pipeline.storage.decode import decode
from pipeline.storage.encode import Settings
from pipeline.system.errors import DamagedRecord, InputError
from pipeline.views import AUGMENTATIONS, View, view_sizes
from tests import processes
from tests.pipeline.loading import BATCH, LEVELS, PLAIN, SIZE, pillow, same, take
from tests.pipeline.loading import small_loader as loader
from tests.pipeline.orders import epoch_order
from tests.side_files import copy_side_files

OTHERS = [name for name in BACKENDS if name != "ffcv"]
SAME_DECODER = [name for name in OTHERS if name != "dali" or decode_rectangle is not None]


@pytest.fixture(scope="module", params=["proportion", "raw"])
def ragged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of images of several shapes, half or all of them stored raw."""
    folder = tmp_path_factory.mktemp("ragged")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number, (height, width) in enumerate(rng.integers(5, 90, (60, 2))):
        y, x = np.mgrid[0:height, 0:width]
        planes = [120 + 100 * np.sin(x / (9 + c) + y / 11 + number) for c in range(3)]
        Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(folder / "images" / f"{number:02}.png")
    prepare(str(folder / "images"), folder / "ragged.beton", Settings(mode=request.param), workers=1, quiet=True)
    return folder / "ragged.beton"


@pytest.mark.parametrize(
    ("views", "ragged"),
    [
        ("moco_v2", "proportion"),
        ("moco_v2", "raw"),
        ("swav", "proportion"),
        pytest.param("swav", "raw", marks=pytest.mark.slow),
    ],
    indirect=["ragged"],
)
@pytest.mark.parametrize("backend", SAME_DECODER)
def test_views_are_the_same_bit_for_bit(backend: str, views: str, ragged: Path) -> None:
    (first_view, *others), changes = AUGMENTATIONS[views], {"vflip": 0.5, "hue": 0, "solarize_p": 0.5}
    every = (replace(first_view, **changes, solarize_threshold=99), *others)  # type: ignore[arg-type]
    settings = {"views": every, "batch": 15, "statistics": Statistics((0.3,) * 3, (0.4,) * 3)}  # four in an epoch
    with loader(ragged, "ffcv", **settings) as first, loader(ragged, backend, workers=2, **settings) as second:
        expected, actual = take(first, 5), take(second, 5)
    assert same(expected, actual)
    assert tuple(view.shape[-1] for view in actual[0].views) == view_sizes(every, SIZE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_epoch_equals_a_loader_of_its_size(backend: str, drawn: Path) -> None:
    """Batches of the next epoch are under way before this one ends; the loader starts from any batch."""
    sizes, steps = (10, 24, 16), 200 // BATCH
    expected: list[Batch] = []
    for epoch, size in enumerate((*sizes, sizes[-1])):
        with loader(drawn, "ffcv" if backend in SAME_DECODER else backend, size=size) as one:
            one.load_state_dict({**one.state_dict(), "epoch": epoch})
            expected += take(one, steps)
    with loader(drawn, backend, size=sizes) as full:
        assert same(take(full, 4 * steps), expected)
    with loader(drawn, backend, size=list(sizes), workers=2) as resumed:
        resumed.load_state_dict({**resumed.state_dict(), "epoch": 1, "step": 4})
        assert same(take(resumed, steps), expected[steps + 4 : 2 * steps + 4])


# each position on one backend or two, the others in slow tests: 5 is the last batch of an epoch of six
RESUMED_AT = {"ffcv": (0, 7), "ffcv_gpu": (1, 13), "dali": (5, 7), "resident": (5, 13)}


@pytest.mark.parametrize(
    ("backend", "position"),
    [
        pytest.param(backend, position, marks=[pytest.mark.slow] * (position not in RESUMED_AT[backend]))
        for backend in BACKENDS
        for position in (0, 1, 5, 7, 13)
    ],
)
def test_any_backend_resumes_from_any_batch(backend: str, position: int, drawn: Path) -> None:
    with loader(drawn, backend) as full:
        expected = take(full, 16)
    with loader(drawn, backend) as begun:
        take(begun, position)
        state = json.loads(json.dumps(begun.state_dict()))
    with loader(drawn, backend) as resumed:
        resumed.load_state_dict(state)
        assert same(take(resumed, 16 - position), expected[position:])


RESUMED = """
import json, sys, torch
from contextlib import closing
from pipeline.beton import Beton
from pipeline.loader import Loader
from pipeline.views import AUGMENTATIONS

path, states, out = sys.argv[1:]
settings = {"size": 16, "batch": 32, "seed": 3, "workers": 1}
views = {}
for backend, state in json.loads(states).items():
    with closing(Loader(Beton(path), AUGMENTATIONS["moco_v2"], backend=backend, **settings)) as loader:
        loader.load_state_dict(state)
        views[backend] = [torch.stack(batch.views).clone() for _ in range(2) for batch in loader]
torch.save(views, out)
"""


def test_another_process_resumes_bit_for_bit(drawn: Path, tmp_path: Path) -> None:
    states, expected = {}, {}
    for backend in BACKENDS:
        with loader(drawn, backend) as full:
            take(full, 4)
            states[backend] = full.state_dict()
            expected[backend] = [torch.stack(batch.views) for batch in take(full, 8)]
    call = [sys.executable, "-c", RESUMED, str(drawn), json.dumps(states), str(tmp_path / "views.pt")]
    done = processes.run(call, timeout=120)
    assert not done.returncode, done.stderr
    actual = torch.load(tmp_path / "views.pt")
    for backend in BACKENDS:
        assert len(actual[backend]) == len(expected[backend])
        assert all(torch.equal(a, b) for a, b in zip(actual[backend], expected[backend], strict=True)), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_forgetting_batches_does_not_rebuild_the_backend(backend: str, drawn: Path) -> None:
    with loader(drawn, backend) as one:
        first, built = take(one, 3), one._queue.backend
        one.load_state_dict({**one.state_dict(), "step": 0})
        assert same(take(one, 3), first)
        assert one._queue.backend is built


def test_dali_decodes_the_next_batch_meanwhile(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches at most; dropped ones leave nothing behind."""
    with loader(drawn, "dali") as one:
        expected = take(one, 3)
    with loader(drawn, "dali") as one:
        backend: Any = one._queue.backend
        decoding, share, free = [], backend._decoder.share_outputs, threading.Event()
        monkeypatch.setattr(
            backend._decoder, "share_outputs", lambda **on: (decoding.append(len(backend._decoding)), share(**on))[1]
        )
        backend._driver.submit(lambda state: free.wait())
        one._refill()
        wait([record for records in backend._reading for record in records])
        free.set()
        assert same(take(one, 1), expected[:1])
        assert decoding[0] == 2
        one.load_state_dict({**one.state_dict(), "step": 0})
        assert not backend._decoding
        assert same(take(one, 3), expected)
        assert max(decoding) == 2
        assert one._queue.backend is backend


def test_gpu_crops_take_memory_for_the_largest_batch(drawn: Path) -> None:
    """Not for a batch of images as large as the largest."""
    beton = Beton(drawn)
    with loader(drawn, "ffcv_gpu") as one:
        take(one, 20)
        rooms = [len(room.bytes) for room in one._queue.backend._buffers]  # type: ignore[attr-defined]
    image = 3 * int(beton.heights[0]) * int(beton.widths[0])
    assert all(0 < room <= 1.25 * BATCH * image for room in rooms)
    room = ffcv_gpu.GrowingBuffer(False)
    for count, kept in ((100, 125), (110, 125), (200, 250), (1, 250)):
        room.reserve(count)
        assert len(room.bytes) == kept


def test_resident_images_are_decoded_in_blocks(ragged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beton, config = Beton(ragged), BackendConfig((SIZE,), 8, 2, 1, torch.device("cpu"), skipped=frozenset({3, 59}))
    monkeypatch.setattr(resident, "_BLOCK_BYTES", 20_000)
    monkeypatch.setattr(resident, "_CHUNK_SAMPLES", 3)
    pixels, starts = resident.decode_all(beton, config)
    ends = [*starts[1:], len(pixels)]
    blocks = resident._blocks(np.array([*starts, ends[-1]]))
    assert len(blocks) > 5
    assert [first for first, _ in blocks] == [0, *[end for _, end in blocks[:-1]]]
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if index not in config.skipped:
            assert np.array_equal(pixels[start:end].numpy(), decode(beton, index).ravel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_staged_ahead_are_the_same(backend: str, drawn: Path) -> None:
    """Like on a GPU, views are made before they are requested; the saved position is that of returned batches."""
    with loader(drawn, backend) as plain, loader(drawn, backend) as staging:
        expected, states = [], []
        for _ in range(16):
            expected += take(plain, 1)
            states.append(plain.state_dict())
        staging._stages = True
        actual, staged = [], 0
        for state in states:
            staging._queue.backend.ready = lambda: True  # type: ignore[method-assign]
            actual += take(staging, 1)
            staged += isinstance(staging._staged, Batch)
            assert staging.state_dict() == state
        assert same(actual, expected)
        assert staged == 16
        staging.load_state_dict(states[4])
        assert same(take(staging, 11), expected[5:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_record_found_while_staging_is_named_in_order(backend: str, drawn: Path, tmp_path: Path) -> None:
    if backend == "resident":
        pytest.skip("it meets all records at the start")
    path = damage(drawn, int(epoch_order(3, 0, 200)[3 * BATCH]), "flipped", tmp_path / "bad.beton")
    with loader(path, backend) as one:
        one._stages, one._queue.backend.ready = True, lambda: True  # type: ignore[method-assign]
        take(one, 3)
        with pytest.raises(DamagedRecord):
            take(one, 1)


@pytest.mark.parametrize("views", ["moco_v2", "swav"])
def test_dalis_views_equal_pillow(views: str, ragged: Path) -> None:
    """The ids, boxes and flips of FFCV's backend, and PIL's pixels to one level."""
    beton = Beton(ragged)
    assert (beton.modes == RAW).any()
    geometric: dict[str, float] = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "vflip": 0.4}
    plain = tuple(replace(view, **geometric) for view in AUGMENTATIONS[views])  # type: ignore[arg-type]
    with loader(beton.path, "dali", views=plain, batch=25, statistics=LEVELS) as one:
        batches = take(one, 3)
    for batch in batches:
        assert (
            batch.ids.tolist()
            == epoch_order(3, batch.epoch, len(beton))[25 * batch.step : 25 * batch.step + 25].tolist()
        )
        for index, (view, images) in enumerate(zip(plain, batch.views, strict=True)):
            sides = {"heights": beton.heights[batch.ids], "widths": beton.widths[batch.ids]}
            drawn_ = draw_view(view, index, seed=3, epoch=batch.epoch, ids=batch.ids, **sides)
            for place, sample in enumerate(batch.ids):
                expected = pillow(beton, int(sample), drawn_.boxes[place], images.shape[-1])
                expected = expected[:, ::-1] if drawn_.flips[place] else expected
                expected = expected[::-1] if drawn_.vflips[place] else expected
                assert np.abs(images[place].permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_together_load_the_batches_of_one(backend: str, world: int, drawn: Path) -> None:
    with loader(drawn, backend) as full:
        alone = take(full, 7)
    parts = []
    for rank in range(world):
        with loader(drawn, backend, rank=rank, world=world) as part:
            parts.append(take(part, 7))
    for batch, *shares in zip(alone, *parts, strict=True):
        assert np.concatenate([share.ids for share in shares]).tolist() == batch.ids.tolist()
        for index, view in enumerate(batch.views):
            assert torch.equal(torch.cat([share.views[index] for share in shares]), view)


@pytest.mark.parametrize("backend", SAME_DECODER)
def test_center_crops_are_the_same(backend: str, ragged: Path) -> None:
    actual = []
    for name in ("ffcv", backend):
        with closing(CenterLoader(Beton(ragged), size=SIZE, batch=7, workers=1, backend=name)) as images:
            actual.append([(image.clone(), ids.tolist()) for image, ids in images])
    for (a, ids_a), (b, ids_b) in zip(*actual, strict=True):
        assert ids_a == ids_b
        assert torch.equal(a, b)


def damage(path: Path, index: int, how: str, to: Path) -> Path:
    """Write a copy of a beton with record `index` damaged, with its manifest only for a flipped byte."""
    beton, data = Beton(path), bytearray(path.read_bytes())
    start, size = int(beton.pointers[index]), int(beton.sizes[index])
    if how == "flipped":
        data[start + size // 2] ^= 255
        copy_side_files(path, to)
    elif how == "garbage":  # within the scan: libjpeg warns and continues
        data[start + size - 60 : start + size - 20] = bytes(range(100, 140))
    elif how == "extraneous":
        data[start + size - 9 : start + size - 2] = b"\xff\xd9\x00\x00\x00\x00\x00"
    else:
        data[start : start + size] = bytes(size)
    to.write_bytes(data)
    return to


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["flipped", "zeros", "garbage", "extraneous"])
def test_a_damaged_record_is_named_on_every_backend(backend: str, how: str, drawn: Path, tmp_path: Path) -> None:
    path = damage(drawn, 123, how, tmp_path / "bad.beton")
    with pytest.raises(DamagedRecord, match="sample 123 "), loader(path, backend) as one:
        take(one, 6)


@pytest.mark.parametrize("backend", OTHERS)
def test_fifty_epochs_leak_no_threads_files_or_memory(backend: str, drawn: Path) -> None:
    with loader(drawn, backend, batch=100, workers=2) as one:
        for _ in range(5):
            list(one)
        gc.collect()
        before = threading.active_count(), len(os.listdir("/proc/self/fd")), psutil.Process().memory_info().rss
        for _ in range(50):
            list(one)
        after = threading.active_count(), len(os.listdir("/proc/self/fd")), psutil.Process().memory_info().rss
    assert after[0] == before[0]
    assert after[1] <= before[1]
    assert after[2] < before[2] + 20 * 2**20  # all images of these epochs: 66 MiB


def test_resident_refuses_what_does_not_fit(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_needed = 3 * sum(int(h) * int(w) for h, w in zip(Beton(drawn).heights, Beton(drawn).widths, strict=True))
    assert resident.needed(Beton(drawn)) == bytes_needed
    monkeypatch.setattr(resident, "free", lambda device: 5 * bytes_needed // 4 - 2)
    with pytest.raises(InputError, match=r"more than 80% of .* free on cpu: choose another backend"):
        Loader(Beton(drawn), AUGMENTATIONS["moco_v2"], size=SIZE, batch=BATCH, backend="resident")
    monkeypatch.setattr(resident, "free", lambda device: 5 * bytes_needed // 4 + 1)
    with loader(drawn, "resident"):
        pass


def test_what_auto_takes_is_not_refused_once_a_model_has_its_memory(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_needed = resident.needed(Beton(drawn))
    monkeypatch.setattr(resident, "free", lambda device: 2 * bytes_needed)
    assert choose("auto", Beton(drawn), torch.device("cpu")).name == "resident"
    monkeypatch.setattr(resident, "free", lambda device: 2 * bytes_needed - bytes_needed // 2)
    with loader(drawn, "resident"):
        pass


@pytest.mark.parametrize(
    ("backend", "device", "room", "local_world", "name"),
    [
        ("auto", "cpu", 2, 1, "resident"),
        ("auto", "cpu", 2, 2, "ffcv"),
        ("auto", "cpu", 1, 1, "ffcv"),
        ("auto", "cuda", 1, 1, "ffcv_gpu"),
        ("auto", "cuda", 2, 8, "resident"),
        ("ffcv", "cpu", 9, 1, "ffcv"),
        ("ffcv", "cuda", 1, 1, "ffcv"),
        ("ffcv_gpu", "cuda", 9, 1, "ffcv_gpu"),
        ("resident", "cpu", 1, 1, "resident"),
    ],
)
def test_choice_depends_on_device_and_memory(
    backend: str,
    device: str,
    room: float,
    local_world: int,
    name: str,
    drawn: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resident, "free", lambda device: int(room * resident.needed(Beton(drawn))))
    choice = choose(backend, Beton(drawn), torch.device(device), local_world=local_world, cores=64)
    assert choice.name == name
    assert (choice.why == "requested") == (backend != "auto")


def test_crops_on_a_missing_gpu_are_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match=r"data\.backend 'ffcv_gpu': this machine has no GPU"):
        choose("ffcv_gpu", Beton(drawn), torch.device("cpu"))


@pytest.mark.parametrize(
    ("cores", "device", "mode", "name"),
    [
        (4, "cuda", JPEG, "dali"),
        (64, "cuda", JPEG, "ffcv_gpu"),
        (4, "cpu", JPEG, "ffcv"),
        (4, "cuda", RAW, "ffcv_gpu"),
    ],
)
def test_few_cores_for_a_gpu_leave_the_decoding_to_it(
    cores: int, device: str, mode: int, name: str, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are like ImageNet's at 500 pixels; one core decodes some 900 of them a second."""
    monkeypatch.setattr(resident, "free", lambda device: 0)
    beton = Beton(drawn)
    count = len(beton)
    beton.heights, beton.widths = np.full(count, 375, np.uint16), np.full(count, 500, np.uint16)
    beton.sizes, beton.modes = np.full(count, 90_000, np.uint64), np.full(count, mode, np.uint8)
    if mode == JPEG:
        assert 700 < decoding_rate(beton, 1) < 1100
    assert choose("auto", beton, torch.device(device), cores=cores).name == name


def test_pillow_decodes_slower_and_on_few_cores(drawn: Path) -> None:
    beton = Beton(drawn)
    beton.modes = np.full(len(beton), JPEG, np.uint8)
    assert decoding_rate(beton, 2, "pillow") < decoding_rate(beton, 2, "partial") / 1.5
    assert (
        decoding_rate(beton, 64, "pillow") == decoding_rate(beton, 8, "pillow") < 2 * decoding_rate(beton, 2, "pillow")
    )
    assert decoding_rate(beton, 64, "partial") == 8 * decoding_rate(beton, 8, "partial")
    beton.modes = np.full(len(beton), RAW, np.uint8)
    assert decoding_rate(beton, 64, "pillow") == decoding_rate(beton, 64, "partial")


def test_without_dali_the_cores_decode(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "free", lambda device: 0)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(select_backend, "PACE", 1e9)
    assert choose("auto", Beton(drawn), torch.device("cuda")).name == "ffcv_gpu"


def test_processes_agree_on_the_backend_that_asks_for_least() -> None:
    def least_demanding(*names: str) -> select_backend.Choice:
        return select_backend.least_demanding([select_backend.Choice(name, f"why {i}") for i, name in enumerate(names)])

    assert least_demanding("resident", "resident") == ("resident", "why 0")
    assert least_demanding("resident", "ffcv", "resident") == ("ffcv", "why 1")
    assert least_demanding("resident", "dali", "ffcv_gpu") == ("ffcv_gpu", "why 2")
    assert least_demanding("resident", "dali") == ("dali", "why 1")


def test_views_of_one_size_each(drawn: Path) -> None:
    views = (View(size=8), View(), View(size=24))
    with loader(drawn, "ffcv", views=views) as one:
        (batch,) = take(one, 1)
    assert [tuple(view.shape) for view in batch.views if view is not None] == [(32, 3, s, s) for s in (8, 16, 24)]


def intact_after(bad: set[int], sample: int, count: int) -> int:
    while sample in bad:
        sample = (sample + 1) % count
    return sample


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_records_are_skipped_for_the_next_intact_one(backend: str, drawn: Path, tmp_path: Path) -> None:
    """All backends and ranks skip alike; draws remain those of the sample; a run resumes exactly from any batch."""
    bad = {5, 77, 78, 199}
    path = drawn
    for number, index in enumerate(sorted(bad)):
        path = damage(path, index, "flipped", tmp_path / f"{number}.beton")
    with loader(path, backend, on_bad="skip", views=(PLAIN, PLAIN), statistics=LEVELS) as one:
        batches = take(one, 9)
    beton = Beton(drawn)
    for batch in batches:
        order = epoch_order(3, batch.epoch, 200)[BATCH * batch.step : BATCH * (batch.step + 1)]
        assert batch.ids.tolist() == [intact_after(bad, int(i), 200) for i in order]
        assert batch.substituted == sum(int(i) in bad for i in order)
        sides = {"heights": beton.heights[batch.ids], "widths": beton.widths[batch.ids]}
        drawn_ = draw_view(PLAIN, 1, seed=3, epoch=batch.epoch, ids=order, **sides)
        with loader(drawn, backend) as intact:
            intact._queue.backend.submit(Plan.from_draws(batch.ids, [drawn_] * 2, (SIZE,) * 2))
            expected = intact._queue.backend.receive(60)[0]
        assert torch.equal(batch.views[1].permute(0, 2, 3, 1), expected.float())
    assert sum(batch.substituted for batch in batches) >= 4
    for rank in (0, 1):
        with loader(path, backend, on_bad="skip", views=(PLAIN, PLAIN), rank=rank, world=2) as part:
            shares = take(part, 9)
        for share, batch in zip(shares, batches, strict=True):
            assert share.ids.tolist() == batch.ids[16 * rank : 16 * (rank + 1)].tolist()
    with loader(path, backend, on_bad="skip", views=(PLAIN, PLAIN), statistics=LEVELS) as resumed:
        resumed.load_state_dict({**resumed.state_dict(), "epoch": batches[4].epoch, "step": batches[4].step})
        assert same(take(resumed, 5), batches[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_center_crops_skip_damaged_records(backend: str, drawn: Path, tmp_path: Path) -> None:
    path = damage(drawn, 40, "flipped", tmp_path / "bad.beton")
    options: dict[str, Any] = {"size": SIZE, "batch": 32, "workers": 1, "backend": backend}
    with closing(CenterLoader(Beton(path), on_bad="skip", **options)) as images:
        ids_read = [ids.tolist() for _, ids in images]
    assert [i for ids in ids_read for i in ids] == [41 if i == 40 else i for i in range(200)]
    with pytest.raises(DamagedRecord, match="sample 40 "), closing(CenterLoader(Beton(path), **options)) as images:
        list(images)


def test_too_many_damaged_records_are_an_error(drawn: Path, tmp_path: Path) -> None:
    path = drawn
    for number, index in enumerate(range(50, 61)):
        path = damage(path, index, "zeros", tmp_path / f"{number}.beton")
    with pytest.raises(InputError, match="at most 10 are skipped"), loader(path, "resident", on_bad="skip"):
        pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forged", ["pointer", "side", "both"])
def test_forged_metadata_is_refused_or_skipped(backend: str, forged: str, drawn: Path, tmp_path: Path) -> None:
    """A pointer outside the file, an impossible side for the record."""
    beton, data = Beton(drawn), bytearray(drawn.read_bytes())
    start = beton.header_end - beton.metadata.nbytes
    rows = np.frombuffer(data, beton.metadata.dtype, len(beton), start).copy()
    images = rows[beton._images]
    if forged in ("pointer", "both"):
        images["data_ptr"][7] = 2**60
    if forged in ("side", "both"):
        images["height"][9] = 65535
        images["width"][9] = 65535
    data[start : start + rows.nbytes] = rows.tobytes()
    path = tmp_path / "forged.beton"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"sample [79] has"):
        Beton(path)
    tolerant = Beton(path, tolerate=True)
    bad = {"pointer": {7}, "side": {9}, "both": {7, 9}}[forged]
    assert tolerant.unreadable == bad
    with closing(
        Loader(tolerant, AUGMENTATIONS["moco_v2"], size=SIZE, batch=200, backend=backend, on_bad="skip")
    ) as one:
        (batch,) = take(one, 1)
    assert sorted(batch.ids.tolist()) == sorted(intact_after(bad, i, 200) for i in range(200))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_s_gpu_views_equal_cpu_views(backend: str, ragged: Path) -> None:
    """The GPU does other work during several epochs; DALI uses another decoder there."""
    settings = {"views": (PLAIN, PLAIN), "batch": 20, "statistics": LEVELS}
    busy = torch.randn(2048, 2048, device="cuda")
    with loader(ragged, "ffcv", **settings) as host, loader(ragged, backend, device="cuda", **settings) as device:
        for expected, actual in ((take(host, 1)[0], take(device, 1)[0]) for _ in range(12)):
            assert expected.ids.tolist() == actual.ids.tolist()
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
            for a, b in zip(expected.views, actual.views, strict=True):
                assert (a - b.cpu()).abs().mean() <= (2 if backend == "dali" else 0.1)
