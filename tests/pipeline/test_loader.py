"""Tests of the loaders: content of the batches, repetition, resuming, and failures."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment.color import IMAGENET, stepwise
from pipeline.augment.draws import draw_view, draw_views
from pipeline.augment.plan import Plan
from pipeline.backends.ffcv import FfcvBackend
from pipeline.beton import Beton
from pipeline.loader import CenterLoader, Loader, LoaderOptions, OptionalKeywords, Shuffle
from pipeline.manifest import manifest_path, side_files
from pipeline.prepare import prepare
from pipeline.sampling import order as order_module
from pipeline.sampling.order import Order, shuffled_rows
from pipeline.storage.decode import decode
from pipeline.storage.encode import Settings
from pipeline.system.errors import DamagedRecord, InputError, LoaderStalled
from pipeline.views import AUGMENTATIONS
from tests.conftest import Figure
from tests.pipeline.loading import BATCH, LEVELS, PLAIN, SIZE, same, small_loader, take
from tests.pipeline.orders import epoch_order

_SAMPLES = 200
_STEPS = _SAMPLES // BATCH
_SHAPES = [(1, 1), (1, 90), (90, 2), (32, 32), (37, 50), (64, 41), (120, 200), (7, 9), (48, 47), (3, 100), (31, 17)]


@pytest.fixture(scope="module", autouse=True)
def _compiled(one_torch_thread: None, drawn: Path) -> None:
    """Compile everything before any test measures time."""
    with small_loader(drawn) as loader:
        take(loader, 1)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of images of odd shapes."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "images").mkdir()
    for number, (height, width) in enumerate(_SHAPES):
        y, x = np.mgrid[0:height, 0:width]
        planes = [120 + 100 * np.sin(x / (9 + c) + y / 11 + number) for c in range(3)]
        Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(folder / "images" / f"{number:02}.png")
    prepare(str(folder / "images"), folder / "odd.beton", workers=1, quiet=True)
    return folder / "odd.beton"


@pytest.fixture
def copied(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the beton, with its manifest."""
    for path in side_files(drawn):
        shutil.copy(path, tmp_path)
    return Path(shutil.copy(drawn, tmp_path / drawn.name))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan submitted to a backend from now on."""
    submitted: list[Plan] = []
    submit = FfcvBackend.submit

    def watched(self: FfcvBackend, plan: Plan) -> None:
        submitted.append(plan)
        submit(self, plan)

    monkeypatch.setattr(FfcvBackend, "submit", watched)
    return submitted


def _levels(images: torch.Tensor) -> np.ndarray:
    """Return images [B, 3, S, S] as [B, S, S, 3]."""
    return images.permute(0, 2, 3, 1).numpy()


def _pillow(beton: Beton, index: int, box: Any, size: int) -> np.ndarray:
    """Return the crop of a decoded record by Pillow."""
    top, left, height, width = (int(value) for value in box)
    crop = Image.fromarray(decode(beton, index)).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)).astype(int)


# ---- content ----


def test_batches_have_views_ids_and_position(drawn: Path) -> None:
    with small_loader(drawn, dtype=torch.bfloat16) as loader:
        batches = take(loader, _STEPS + 2)
    assert [(batch.epoch, batch.step) for batch in batches] == [*((0, s) for s in range(_STEPS)), (1, 0), (1, 1)]
    for batch in batches:
        assert batch.ids.shape == (BATCH,)
        assert batch.ids.dtype == np.int64
        assert len(batch.views) == 2
        assert batch.waited >= 0.0
        for view in batch.views:
            assert view.shape == (BATCH, 3, SIZE, SIZE)
            assert view.dtype == torch.bfloat16
            assert view.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_has_full_batches_of_distinct_ids(drawn: Path) -> None:
    with small_loader(drawn) as loader:
        assert len(loader) == _STEPS
        for epoch in range(3):
            batches = list(loader)
            ids = np.concatenate([batch.ids for batch in batches])
            assert [batch.step for batch in batches] == list(range(_STEPS))
            assert {batch.epoch for batch in batches} == {epoch}
            assert len(set(ids.tolist())) == _STEPS * BATCH
            assert ids.tolist() == epoch_order(3, epoch, _SAMPLES)[: _STEPS * BATCH].tolist()


@pytest.mark.parametrize("shapes", ["drawn", "odd"])
def test_views_equal_pillow_s_crops_of_the_boxes(shapes: str, request: pytest.FixtureRequest) -> None:
    path, view_ = request.getfixturevalue(shapes), replace(PLAIN, vflip=0.5)
    beton = Beton(path)
    with small_loader(path, views=(view_, view_), batch=len(_SHAPES), statistics=LEVELS) as loader:
        batches = take(loader, 3)
    mirrored = 0
    for batch in batches:
        sides = {"heights": beton.heights[batch.ids], "widths": beton.widths[batch.ids]}
        for index, view in enumerate(batch.views):
            draws = draw_view(view_, index, seed=3, epoch=batch.epoch, ids=batch.ids, **sides)
            for row, sample in enumerate(batch.ids):
                expected = _pillow(beton, int(sample), draws.boxes[row], SIZE)
                expected = expected[::-1] if draws.vflips[row] else expected
                if draws.flips[row]:
                    expected, mirrored = expected[:, ::-1], mirrored + 1
                assert np.abs(_levels(view)[row] - expected).max() < 1.01
    assert 0 < mirrored < 6 * len(_SHAPES)


def test_the_two_views_differ(drawn: Path) -> None:
    with small_loader(drawn, views=(PLAIN, PLAIN)) as loader:
        (batch,) = take(loader, 1)
    assert not (batch.views[0] == batch.views[1]).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_views(drawn: Path, count: int) -> None:
    views = (*AUGMENTATIONS["moco_v3"], PLAIN)
    with small_loader(drawn, views=views) as all_views, small_loader(drawn, views=views[:count]) as some:
        (full,), (part,) = take(all_views, 1), take(some, 1)
    assert len(part.views) == count
    assert all(torch.equal(a, b) for a, b in zip(part.views, full.views, strict=False))


# ---- repetition ----


@pytest.mark.parametrize("other", [{}, {"workers": 2}, {"workers": 5}, {"prefetch_factor": 1}, {"prefetch_factor": 7}])
def test_batches_do_not_depend_on_workers_or_prefetching(drawn: Path, other: dict[str, int]) -> None:
    with small_loader(drawn) as a, small_loader(drawn, **other) as b:
        assert same(take(a, _STEPS + 3), take(b, _STEPS + 3))


def test_another_seed_gives_other_batches(drawn: Path) -> None:
    with small_loader(drawn) as a, small_loader(drawn, seed=4) as b:
        (first,), (second,) = take(a, 1), take(b, 1)
    assert first.ids.tolist() != second.ids.tolist()


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 1}])
def test_another_seed_or_epoch_gives_other_views_of_a_sample(drawn: Path, other: dict[str, int]) -> None:
    with small_loader(drawn, batch=_SAMPLES) as a, small_loader(drawn, batch=_SAMPLES, seed=other.get("seed", 3)) as b:
        (first,), second = take(a, 1), take(b, 2)[other.get("epoch", 0)]
    by_id = [
        view[np.argsort(batch.ids)].flatten(1) for batch, view in ((first, first.views[0]), (second, second.views[0]))
    ]
    assert not (by_id[0] == by_id[1]).all(dim=1).any()


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_together_load_the_batches_of_one(drawn: Path, world: int) -> None:
    with small_loader(drawn) as full:
        alone = take(full, _STEPS + 2)
    parts = []
    for rank in range(world):
        with small_loader(drawn, rank=rank, world=world) as part:
            parts.append(take(part, _STEPS + 2))
    for batch, *shares in zip(alone, *parts, strict=True):
        assert {(share.epoch, share.step) for share in shares} == {(batch.epoch, batch.step)}
        assert np.concatenate([share.ids for share in shares]).tolist() == batch.ids.tolist()
        for index, view in enumerate(batch.views):
            assert torch.equal(torch.cat([share.views[index] for share in shares]), view)


@pytest.mark.parametrize("name", ["moco_v2", "moco_v3"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shuffled_views_are_the_views_of_the_permuted_samples(drawn: Path, name: str, world: int) -> None:
    """Across an epoch's end, with an exchange that has all ranks' crops."""
    with small_loader(drawn, views=AUGMENTATIONS[name]) as full:
        alone = take(full, _STEPS + 2)
    everyone: list[torch.Tensor] = []

    def record(rows: torch.Tensor, order: np.ndarray) -> torch.Tensor:
        everyone.append(rows.clone())
        return rows

    with small_loader(drawn, views=AUGMENTATIONS[name], shuffle=Shuffle((0, 1), record)) as one:
        take(one, _STEPS + 2)
    for rank in range(world):
        crops = iter(everyone)

        def exchange(rows: torch.Tensor, order: np.ndarray, rank: int = rank, crops: Any = crops) -> torch.Tensor:
            of_all = next(crops)
            assert rows.dtype == torch.uint8
            assert torch.equal(rows, of_all.chunk(world)[rank])
            return of_all[order].chunk(world)[rank]

        shuffle = Shuffle((0, 1), exchange, parts=1, only=(1,))
        with small_loader(drawn, views=AUGMENTATIONS[name], rank=rank, world=world, shuffle=shuffle) as part:
            for number, (batch, share) in enumerate(zip(alone, take(part, _STEPS + 2), strict=True)):
                assert share.order is not None
                assert share.order.tolist() == shuffled_rows(3, number, BATCH).tolist()
                for index in (0, 1):
                    assert torch.equal(share.shuffled[index], batch.views[index][share.order].chunk(world)[rank])
                assert torch.equal(share.views[0], batch.views[0].chunk(world)[rank])
                assert share.views[1] is None


def test_raw_records_give_the_same_ids_and_boxes(drawn: Path, tmp_path: Path, plans: list[Plan]) -> None:
    raw = tmp_path / "raw.beton"
    prepare(f"synthetic:{_SAMPLES}", raw, Settings(mode="raw"), workers=1, quiet=True)
    views = (PLAIN, PLAIN)
    runs = []
    for path in (drawn, raw):
        plans.clear()
        with small_loader(path, views=views, statistics=LEVELS) as loader:
            batches = take(loader, _STEPS + 1)
        runs.append((batches, list(plans)))
    (jpeg_batches, jpeg_plans), (raw_batches, raw_plans) = runs
    assert [batch.ids.tolist() for batch in jpeg_batches] == [batch.ids.tolist() for batch in raw_batches]
    for a, b in zip(jpeg_plans, raw_plans, strict=True):
        assert np.array_equal(a.boxes, b.boxes)
        assert np.array_equal(a.flips, b.flips)
    for x, y in zip(jpeg_batches, raw_batches, strict=True):  # JPEG is lossy
        assert (x.views[0] - y.views[0]).abs().mean() < 2


# ---- resuming ----


@pytest.mark.parametrize("position", range(_STEPS + 2))
@pytest.mark.parametrize("begun", [0, 2])
def test_a_loader_resumes_from_any_position(drawn: Path, position: int, begun: int) -> None:
    """Positions are before the first batch, after each, and in the next epoch; loaders are new or used."""
    with small_loader(drawn) as first, small_loader(drawn) as second:
        take(first, position)
        state = json.loads(json.dumps(first.state_dict()))
        assert (state["epoch"], state["step"]) == divmod(position, _STEPS)
        take(second, begun)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert same(take(first, 3), take(second, 3))


def test_an_interrupted_epoch_is_continued(drawn: Path) -> None:
    with small_loader(drawn) as full, small_loader(drawn) as left:
        for batch in left:
            if batch.step == 1:
                break
        rest = list(left)
        assert [batch.step for batch in rest] == list(range(2, _STEPS))
        assert same(rest, take(full, _STEPS)[2:])


def test_a_state_resumes_with_other_ranks_and_workers(drawn: Path) -> None:
    with small_loader(drawn) as one, small_loader(drawn, rank=1, world=2, workers=2, prefetch_factor=2) as two:
        take(one, 2)
        two.load_state_dict(one.state_dict())
        (full,), (half,) = take(one, 1), take(two, 1)
    assert half.ids.tolist() == full.ids[BATCH // 2 :].tolist()
    assert torch.equal(half.views[1], full.views[1][BATCH // 2 :])


def test_a_state_with_the_former_name_of_its_order_is_loaded(drawn: Path) -> None:
    with small_loader(drawn, order="quasi_random") as loader:
        loader.load_state_dict(loader.state_dict() | {"order": "chunked", "step": 2})
        assert loader.state_dict()["step"] == 2


@pytest.mark.parametrize("order", ["random", "quasi_random"])
def test_a_run_resumes_with_the_order_of_its_version(
    drawn: Path, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of the first version do not name it. The present order differs only where sets are larger than tables."""
    monkeypatch.setattr(order_module, "_TABLE_IDS", 7)
    with small_loader(drawn, order=order) as first, small_loader(drawn, order=order) as second:
        state = first.state_dict()
        assert state.pop("order_version") == 2
        second.load_state_dict(state | {"step": 1})
        of_first, of_second = (np.concatenate([batch.ids for batch in take(x, 3)]) for x in (first, second))
        saved = second.state_dict()
        assert saved["order_version"] == 1
        first.load_state_dict(saved)
        assert same(take(first, 2), take(second, 2))
    positions = np.arange(3 * BATCH)
    assert of_first.tolist() == order_module.ids(order, 3, 0, _SAMPLES, positions).tolist()
    assert of_second.tolist() == order_module.ids(order, 3, 0, _SAMPLES, BATCH + positions, version=1).tolist()
    assert of_first[BATCH:].tolist() != of_second[: 2 * BATCH].tolist()


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_load_state_rejects_an_order_it_does_not_know(drawn: Path, version: object) -> None:
    with small_loader(drawn) as loader, pytest.raises(InputError, match="the saved order has version"):
        loader.load_state_dict(loader.state_dict() | {"order_version": version})


@pytest.mark.parametrize("settings", [{"seed": 4}, {"batch": 16}])
def test_load_state_rejects_other_settings(drawn: Path, settings: dict[str, int]) -> None:
    name = next(iter(settings))
    with small_loader(drawn) as loader, small_loader(drawn, **settings) as other:
        before = loader.state_dict()
        with pytest.raises(InputError, match=f"the loader's {name} is .*, the saved one {settings[name]}") as caught:
            loader.load_state_dict(other.state_dict())
        assert loader.state_dict() == before
    assert "\n" not in str(caught.value)


def test_load_state_rejects_other_data(drawn: Path, tmp_path: Path) -> None:
    fewer, quality = tmp_path / "fewer.beton", tmp_path / "quality.beton"
    prepare("synthetic:100", fewer, workers=1, quiet=True)
    prepare(f"synthetic:{_SAMPLES}", quality, Settings(mode="raw"), workers=1, quiet=True)
    with small_loader(drawn) as loader:
        for path, what in ((fewer, "samples"), (quality, "fingerprint")):
            with small_loader(path) as other, pytest.raises(InputError, match=f"the loader's {what} is"):
                loader.load_state_dict(other.state_dict())


def test_load_state_rejects_an_empty_state(drawn: Path) -> None:
    with small_loader(drawn) as loader, pytest.raises(InputError, match="the saved one None"):
        loader.load_state_dict({})


# ---- failures ----


def _place_of(sample: int) -> int:
    """Return the step of epoch 0 that contains the sample."""
    return int(np.flatnonzero(epoch_order(3, 0, _SAMPLES) == sample)[0]) // BATCH


_DAMAGED = int(epoch_order(3, 0, _SAMPLES)[3 * BATCH + 5])  # in step 3


def _flip_byte(path: Path, sample: int) -> None:
    beton = Beton(path)
    with open(path, "r+b") as file:
        file.seek(int(beton.pointers[sample]) + int(beton.sizes[sample]) * 3 // 4)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def _forge_size(path: Path, sample: int) -> None:
    """Give the image one more row in the metadata than in its JPEG."""
    beton = Beton(path)
    row = beton.metadata.dtype
    table = np.memmap(path, dtype=row, mode="r+", offset=beton.header_end - beton.metadata.nbytes, shape=len(beton))
    field = next(name for name in row.names or () if "height" in (row[name].names or ()))
    table[field]["height"][sample] += 1
    table.flush()


def _forge_jpeg(path: Path, sample: int) -> None:
    """Multiply the height in the JPEG's frame header by ten."""
    beton = Beton(path)
    start = beton.record(sample).tobytes().index(b"\xff\xc0")
    with open(path, "r+b") as file:
        file.seek(int(beton.pointers[sample]) + start + 5)
        file.write((480).to_bytes(2, "big"))


def _cut_short(path: Path, sample: int) -> None:
    """Overwrite the second half of the record."""
    beton = Beton(path)
    half = int(beton.sizes[sample]) // 2
    with open(path, "r+b") as file:
        file.seek(int(beton.pointers[sample]) + half)
        file.write(bytes(int(beton.sizes[sample]) - half))


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("damage", "manifest", "fault"),
    [
        (_flip_byte, True, "CRC32 differs"),
        (_forge_jpeg, True, "CRC32 differs"),
        (_forge_size, False, "does not decode, or not to the stored height and width"),
        (_forge_jpeg, False, "does not decode, or not to the stored height and width"),
        (_cut_short, False, "does not decode, or not to the stored height and width"),
    ],
)
def test_a_damaged_record_is_named_when_reached(
    copied: Path, damage: Any, manifest: bool, fault: str, figure: Figure
) -> None:
    name = Beton(copied).name(_DAMAGED) if manifest else f"number {_DAMAGED}"
    damage(copied, _DAMAGED)
    if not manifest:
        manifest_path(copied).unlink()
    with small_loader(copied, workers=2) as loader:
        assert [batch.step for batch in take(loader, 3)] == [0, 1, 2]
        start = time.monotonic()
        with pytest.raises(DamagedRecord, match=rf"sample {_DAMAGED} \({name}\) is damaged: .*{fault}") as caught:
            take(loader, 1)
        took = time.monotonic() - start
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (0, 3)
    assert "\n" not in str(caught.value)
    measured = f"{damage.__name__.strip('_')}: error with sample id after {took:.2f} s"
    figure("loader worker raises; loader stalls", measured)
    assert took < 1


def test_a_damaged_record_is_named_again_on_the_next_try(copied: Path) -> None:
    _flip_byte(copied, _DAMAGED)
    with small_loader(copied) as loader:
        take(loader, 3)
        for _ in range(2):
            with pytest.raises(DamagedRecord, match=f"sample {_DAMAGED} "):
                take(loader, 1)


def test_the_first_of_several_damaged_records_is_named(copied: Path) -> None:
    first, second = (int(epoch_order(3, 0, _SAMPLES)[row]) for row in (9, 20))
    for sample in (first, second):
        _flip_byte(copied, sample)
    with small_loader(copied, workers=2) as loader, pytest.raises(DamagedRecord, match=f"sample {first} "):
        take(loader, 1)


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let workers hang until the event is set."""
    resume, fill = threading.Event(), FfcvBackend._fill

    def hang(*args: Any) -> None:
        assert resume.wait(20)
        fill(*args)

    monkeypatch.setattr(FfcvBackend, "_fill", hang)
    yield resume
    resume.set()


@pytest.mark.reliability
def test_a_stalled_worker_is_an_error_after_the_timeout(drawn: Path, stalled: threading.Event, figure: Figure) -> None:
    with small_loader(drawn, stall_timeout=2.5) as loader:
        start = time.monotonic()
        with pytest.raises(LoaderStalled, match=r"no batch for 2\.5 s .*--data\.stall-timeout"):
            take(loader, 1)
        took = time.monotonic() - start
        stalled.set()
    figure("loader worker raises; loader stalls", f"stall_timeout of 2.5 s: error after {took:.2f} s")
    assert took == pytest.approx(2.5, rel=0.1)


def test_a_stalled_loader_resumes_with_the_same_batches(drawn: Path, stalled: threading.Event) -> None:
    with small_loader(drawn, stall_timeout=0.2) as loader, small_loader(drawn) as other:
        with pytest.raises(LoaderStalled):
            take(loader, 1)
        assert loader.state_dict()["step"] == 0
        stalled.set()
        loader.stall_timeout = 20.0
        assert same(take(loader, _STEPS), take(other, _STEPS))


@pytest.mark.parametrize("error", [ZeroDivisionError, OSError, TimeoutError, MemoryError, KeyError])
def test_other_errors_of_workers_are_raised(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: Any) -> None:
        raise error("as it was raised")

    monkeypatch.setattr(FfcvBackend, "_fill", fail)
    with small_loader(drawn) as loader, pytest.raises(error, match="as it was raised"):
        take(loader, 1)


@pytest.mark.parametrize("batch", [0, -1, _SAMPLES + 1])
def test_a_batch_of_impossible_size_is_refused(drawn: Path, batch: int) -> None:
    with pytest.raises(InputError, match=f"a batch of {batch} from 200 samples: choose 1 to 200"):
        small_loader(drawn, batch=batch)


def test_a_batch_of_all_samples_is_an_epoch(drawn: Path) -> None:
    with small_loader(drawn, batch=_SAMPLES) as loader:
        (batch,) = list(loader)
    assert sorted(batch.ids.tolist()) == list(range(_SAMPLES))


def test_a_batch_not_divisible_by_the_ranks_is_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match=r"data\.batch 32 does not divide among 3 ranks: choose a multiple of 3"):
        small_loader(drawn, world=3)


def test_an_unknown_backend_is_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match=r"data\.backend 'tape' is not one of .*ffcv.*: choose one of these"):
        small_loader(drawn, backend="tape")
    with pytest.raises(InputError, match=r"data\.backend 'tape' is not one of"):
        CenterLoader(Beton(drawn), size=SIZE, batch=8, backend="tape")


# ---- prefetching without growth ----


@pytest.mark.parametrize("ahead", [1, 3])
def test_the_next_epoch_is_under_way_before_one_ends(drawn: Path, plans: list[Plan], ahead: int) -> None:
    with small_loader(drawn, prefetch_factor=ahead) as loader:
        for number, _ in enumerate(loader, 1):
            assert len(plans) == number + ahead
    order = epoch_order(3, 1, _SAMPLES)
    assert plans[_STEPS].ids.tolist() == order[:BATCH].tolist()


def test_prefetching_is_bounded(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, submit = 0, FfcvBackend.submit

    def counted(self: FfcvBackend, plan: Plan) -> None:
        nonlocal most
        submit(self, plan)
        most = max(most, len(self._pending))

    monkeypatch.setattr(FfcvBackend, "submit", counted)
    with small_loader(drawn, prefetch_factor=2) as loader:
        take(loader, 2 * _STEPS)
    assert most == 2


def test_memory_of_views_is_used_again_once_they_are_dropped(drawn: Path) -> None:
    """Three batches are under way, while the caller holds one and then asks for the next."""
    with small_loader(drawn, prefetch_factor=3) as loader:
        places = [batch.views[0].data_ptr() for batch in itertools.islice(loader.endless(), 4 * _STEPS)]
    assert len(set(places)) <= 2 * 5  # both views use the same memory in turn
    assert set(places[-_STEPS:]) <= set(places[:_STEPS])


def test_views_that_the_caller_keeps_stay_as_they_are(drawn: Path) -> None:
    with small_loader(drawn) as loader:
        kept = [view for batch in take(loader, 3 * _STEPS) for view in batch.views]
        copies = [view.clone() for view in kept]
        take(loader, 3 * _STEPS)
    assert len({view.data_ptr() for view in kept}) == len(kept)
    assert all(torch.equal(view, copy) for view, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize("backend", ["ffcv", "ffcv_gpu", "resident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_equal_the_batched_operations_on_the_crops(
    drawn: Path, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.backends.ffcv._CACHED_BYTES", 3 * 2 * 3 * 24**2)  # three samples at a time
    beton, views, steps = Beton(drawn), AUGMENTATIONS["moco_v3"], []
    with small_loader(drawn, backend, views=views, dtype=dtype, size=24, workers=2) as loader:
        batches = take(loader, 2)
        for batch in batches:
            sides = {"heights": beton.heights[batch.ids], "widths": beton.widths[batch.ids]}
            draws = draw_views(views, seed=3, epoch=0, ids=batch.ids, **sides)
            loader._queue.forget()
            loader._queue.backend.submit(Plan.from_draws(batch.ids, draws, (24, 24)))
            crops = loader._queue.backend.receive(60)
            steps.append([stepwise(crop, d.color, IMAGENET, dtype) for crop, d in zip(crops, draws, strict=True)])
    for batch, expected in zip(batches, steps, strict=True):
        assert all(torch.equal(view, other) for view, other in zip(batch.views, expected, strict=True))


def _threads_and_files() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_twenty_epochs_leak_no_threads_or_files(drawn: Path) -> None:
    with small_loader(drawn, batch=100, workers=2) as loader:
        list(loader)
        before = _threads_and_files()
        for _ in range(20):
            list(loader)
            loader.state_dict()
        assert _threads_and_files() == before


def test_closed_and_reset_loaders_leak_no_threads(drawn: Path) -> None:
    before = threading.active_count()
    for _ in range(5):
        with small_loader(drawn, workers=2) as loader:
            take(loader, 1)
            loader.load_state_dict(loader.state_dict())
            assert threading.active_count() == before + 2
            take(loader, 1)
        assert threading.active_count() == before


@pytest.mark.gpu
def test_gpu_views_equal_cpu_views(drawn: Path) -> None:
    with (
        small_loader(drawn, views=(PLAIN, PLAIN)) as host,
        small_loader(drawn, views=(PLAIN, PLAIN), device="cuda") as device,
    ):
        for a, b in zip(take(host, 2 * _STEPS), take(device, 2 * _STEPS), strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            for v, w in zip(a.views, b.views, strict=True):
                assert torch.allclose(v, w.cpu(), atol=1e-5)


# ---- CenterLoader ----


@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_center_crops_equal_pillow(odd: Path, crop_ratio: float) -> None:
    beton = Beton(odd)
    with closing(CenterLoader(beton, size=24, batch=4, crop_ratio=crop_ratio, workers=1, statistics=LEVELS)) as loader:
        batches = list(loader)
        assert len(loader) == len(batches) == 3
    assert [ids.tolist() for _, ids in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for images, ids in batches:
        assert images.shape == (len(ids), 3, 24, 24)
        for image, sample in zip(_levels(images), ids.tolist(), strict=True):
            height, width = _SHAPES[sample]
            side = max(1, round(crop_ratio * min(height, width)))
            box = ((height - side) // 2, (width - side) // 2, side, side)
            assert np.abs(image - _pillow(beton, sample, box, 24)).max() < 1.01


def _center(path: Path, **settings: Any) -> Any:
    chosen: dict[str, Any] = {"size": SIZE, "batch": 32, "workers": 2, **settings}
    return closing(CenterLoader(Beton(path), **chosen))


def test_every_sample_comes_once_in_order_each_time(drawn: Path) -> None:
    with _center(drawn) as loader:
        once, again = list(loader), list(loader)
    for batches in (once, again):
        assert [len(ids) for _, ids in batches] == [32] * 6 + [8]
        assert np.concatenate([ids for _, ids in batches]).tolist() == list(range(_SAMPLES))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))


@pytest.mark.parametrize("batch", [7, 64, 200, 1000])
@pytest.mark.parametrize("ahead", [1, 3])
def test_center_crops_do_not_depend_on_the_batch(drawn: Path, batch: int, ahead: int) -> None:
    with _center(drawn) as plain, _center(drawn, batch=batch, prefetch_factor=ahead) as other:
        assert torch.equal(torch.cat([images for images, _ in plain]), torch.cat([images for images, _ in other]))


def test_indices_are_loaded_in_their_order(drawn: Path) -> None:
    chosen = np.array([150, 3, 77, 3, 199])
    with _center(drawn) as full, _center(drawn, batch=2, indices=chosen) as some, _center(drawn) as none:
        everything = torch.cat([images for images, _ in full])
        batches = list(some)
        none.indices = chosen[:0]
        assert list(none) == []
    assert np.concatenate([ids for _, ids in batches]).tolist() == chosen.tolist()
    assert torch.equal(torch.cat([images for images, _ in batches]), everything[chosen])


def test_an_interrupted_center_loader_restarts(drawn: Path) -> None:
    with _center(drawn, batch=16) as loader, _center(drawn, batch=16) as other:
        next(iter(loader))
        for (images, ids), (expected, expected_ids) in zip(loader, other, strict=True):
            assert ids.tolist() == expected_ids.tolist()
            assert torch.equal(images, expected)


def test_a_damaged_record_is_named_by_the_center_loader(copied: Path) -> None:
    _flip_byte(copied, 40)
    with _center(copied) as loader, pytest.raises(DamagedRecord, match="sample 40 "):
        list(loader)


@pytest.mark.gpu
def test_host_queues_two_steps_at_most(drawn: Path) -> None:
    """The third is not begun before the first has ended on the GPU; a step takes some 50 ms here."""
    ends = list[torch.cuda.Event]()
    with small_loader(drawn, "resident", device="cuda") as loader:
        for _, batch in zip(range(6), loader.endless(), strict=False):
            if len(ends) >= 3:
                assert ends[-3].query()
            assert batch.views[0] is not None
            torch.cuda._sleep(100_000_000)
            ends.append(torch.cuda.current_stream().record_event())
        assert not ends[-1].query()


def test_keywords_are_the_options_that_have_a_default() -> None:
    hints = get_type_hints(LoaderOptions)
    optional = {field.name: hints[field.name] for field in fields(LoaderOptions) if field.default is not MISSING}
    assert get_type_hints(OptionalKeywords) == optional
    assert {"size", "batch"} | optional.keys() == hints.keys()
    for kind in (Loader, CenterLoader):
        assert {"size", "batch"} <= inspect.signature(kind).parameters.keys()
