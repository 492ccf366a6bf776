"""Tests of the loaders: what a batch holds, that it can be had again, and how they fail."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment.color import Statistics
from pipeline.augment.draws import draw_view
from pipeline.augment.plan import Plan
from pipeline.backends.ffcv import FfcvBackend
from pipeline.beton import Beton, manifest_path
from pipeline.loader import Batch, CenterLoader, Loader, Shuffle
from pipeline.prepare import prepare
from pipeline.sampling.order import epoch_order, shuffled_rows
from pipeline.storage.decode import decode
from pipeline.storage.encode import Settings
from pipeline.system.errors import DamagedRecord, InputError, LoaderStalled
from pipeline.views import AUGMENTATIONS, View
from tests.conftest import Figure

_SIZE, _BATCH, _SAMPLES = 16, 32, 200
_STEPS = _SAMPLES // _BATCH
_LEVELS = Statistics((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves 0..255 as it is
_CROP_ONLY = View(jitter=0.0, gray=0.0, blur=0.0)
_SHAPES = [(1, 1), (1, 90), (90, 2), (32, 32), (37, 50), (64, 41), (120, 200), (7, 9), (48, 47), (3, 100), (31, 17)]


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Several spin for each other, and for a hundred times as long where other programs want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _compiled(_one_torch_thread: None, drawn: Path) -> None:
    """Have everything compiled before any test measures time."""
    with _loader(drawn) as loader:
        _take(loader, 1)


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
    """A beton of one's own, with its manifest."""
    shutil.copy(manifest_path(drawn), manifest_path(tmp_path / drawn.name))
    return Path(shutil.copy(drawn, tmp_path / drawn.name))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that a backend is given from now on."""
    given: list[Plan] = []
    submit = FfcvBackend.submit

    def watched(self: FfcvBackend, plan: Plan) -> None:
        given.append(plan)
        submit(self, plan)

    monkeypatch.setattr(FfcvBackend, "submit", watched)
    return given


def _loader(path: Path, **settings: Any) -> Any:
    """A small loader that is closed at the end of a with block."""
    chosen = {"size": _SIZE, "batch": _BATCH, "workers": 1, "seed": 3} | settings
    return closing(Loader(Beton(path), chosen.pop("views", AUGMENTATIONS["moco_v2"]), **chosen))


def _take(loader: Loader, count: int) -> list[Batch]:
    """The next batches, of as many epochs as it takes."""
    epochs = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    return list(itertools.islice(epochs, count))


def _equal(a: list[Batch], b: list[Batch]) -> bool:
    """Whether the batches are the same, bit for bit."""
    return len(a) == len(b) and all(
        (x.epoch, x.step, x.ids.tolist()) == (y.epoch, y.step, y.ids.tolist())
        and all(torch.equal(v, w) for v, w in zip(x.views, y.views, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def _levels(images: torch.Tensor) -> np.ndarray:
    """Images [B, 3, S, S] as [B, S, S, 3]."""
    return images.permute(0, 2, 3, 1).numpy()


def _pillow(beton: Beton, index: int, box: Any, size: int) -> np.ndarray:
    """The record's image, as FFCV decodes it, cropped and resized by Pillow."""
    top, left, height, width = (int(value) for value in box)
    crop = Image.fromarray(decode(beton, index)).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)).astype(int)


# ---- what a batch holds ----


def test_batches_hold_views_ids_and_their_place(drawn: Path) -> None:
    with _loader(drawn, dtype=torch.bfloat16) as loader:
        batches = _take(loader, _STEPS + 2)
    assert [(batch.epoch, batch.step) for batch in batches] == [*((0, s) for s in range(_STEPS)), (1, 0), (1, 1)]
    for batch in batches:
        assert batch.ids.shape == (_BATCH,)
        assert batch.ids.dtype == np.int64
        assert len(batch.views) == 2
        assert batch.waited >= 0.0
        for view in batch.views:
            assert view.shape == (_BATCH, 3, _SIZE, _SIZE)
            assert view.dtype == torch.bfloat16
            assert view.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_holds_every_id_at_most_once_in_whole_batches(drawn: Path) -> None:
    with _loader(drawn) as loader:
        assert len(loader) == _STEPS
        for epoch in range(3):
            batches = list(loader)
            ids = np.concatenate([batch.ids for batch in batches])
            assert [batch.step for batch in batches] == list(range(_STEPS))
            assert {batch.epoch for batch in batches} == {epoch}
            assert len(set(ids.tolist())) == _STEPS * _BATCH
            assert ids.tolist() == epoch_order(3, epoch, _SAMPLES)[: _STEPS * _BATCH].tolist()


@pytest.mark.parametrize("shapes", ["drawn", "odd"])
def test_views_are_pillow_s_crops_of_the_drawn_boxes(shapes: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(shapes)
    beton = Beton(path)
    with _loader(path, views=(_CROP_ONLY, _CROP_ONLY), batch=len(_SHAPES), statistics=_LEVELS) as loader:
        batches = _take(loader, 3)
    mirrored = 0
    for batch in batches:
        sides = {"heights": beton.heights[batch.ids], "widths": beton.widths[batch.ids]}
        for index, view in enumerate(batch.views):
            draws = draw_view(_CROP_ONLY, index, seed=3, epoch=batch.epoch, ids=batch.ids, **sides)
            for place, sample in enumerate(batch.ids):
                want = _pillow(beton, int(sample), draws.boxes[place], _SIZE)
                if draws.flips[place]:
                    want, mirrored = want[:, ::-1], mirrored + 1
                assert np.abs(_levels(view)[place] - want).max() < 1.01
    assert 0 < mirrored < 6 * len(_SHAPES)


def test_the_two_views_differ(drawn: Path) -> None:
    with _loader(drawn, views=(_CROP_ONLY, _CROP_ONLY)) as loader:
        (batch,) = _take(loader, 1)
    assert not (batch.views[0] == batch.views[1]).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_views_can_be_had(drawn: Path, count: int) -> None:
    views = (*AUGMENTATIONS["moco_v3"], _CROP_ONLY)
    with _loader(drawn, views=views) as all_views, _loader(drawn, views=views[:count]) as some:
        (whole,), (part,) = _take(all_views, 1), _take(some, 1)
    assert len(part.views) == count
    assert all(torch.equal(a, b) for a, b in zip(part.views, whole.views, strict=False))


# ---- the same again ----


@pytest.mark.parametrize("other", [{}, {"workers": 2}, {"workers": 5}, {"ahead": 1}, {"ahead": 7}])
def test_same_seed_gives_the_same_batches_however_they_are_made(drawn: Path, other: dict[str, int]) -> None:
    with _loader(drawn) as a, _loader(drawn, **other) as b:
        assert _equal(_take(a, _STEPS + 3), _take(b, _STEPS + 3))


def test_another_seed_gives_other_batches(drawn: Path) -> None:
    with _loader(drawn) as a, _loader(drawn, seed=4) as b:
        (first,), (second,) = _take(a, 1), _take(b, 1)
    assert first.ids.tolist() != second.ids.tolist()


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 1}])
def test_another_seed_or_epoch_gives_other_views_of_a_sample(drawn: Path, other: dict[str, int]) -> None:
    with _loader(drawn, batch=_SAMPLES) as a, _loader(drawn, batch=_SAMPLES, seed=other.get("seed", 3)) as b:
        (first,), second = _take(a, 1), _take(b, 2)[other.get("epoch", 0)]
    by_id = [
        view[np.argsort(batch.ids)].flatten(1) for batch, view in ((first, first.views[0]), (second, second.views[0]))
    ]
    assert not (by_id[0] == by_id[1]).all(dim=1).any()


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_together_give_the_batches_of_one(drawn: Path, world: int) -> None:
    with _loader(drawn) as whole:
        alone = _take(whole, _STEPS + 2)
    parts = []
    for rank in range(world):
        with _loader(drawn, rank=rank, world=world) as part:
            parts.append(_take(part, _STEPS + 2))
    for batch, *shares in zip(alone, *parts, strict=True):
        assert {(share.epoch, share.step) for share in shares} == {(batch.epoch, batch.step)}
        assert np.concatenate([share.ids for share in shares]).tolist() == batch.ids.tolist()
        for index, view in enumerate(batch.views):
            assert torch.equal(torch.cat([share.views[index] for share in shares]), view)


@pytest.mark.parametrize("name", ["moco_v2", "moco_v3"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shuffled_views_are_the_views_of_the_permuted_samples(drawn: Path, name: str, world: int) -> None:
    """Over an epoch's end, with an exchange that has all ranks' crops at hand."""
    with _loader(drawn, views=AUGMENTATIONS[name]) as whole:
        alone = _take(whole, _STEPS + 2)
    everyone: list[torch.Tensor] = []

    def record(rows: torch.Tensor, order: np.ndarray) -> torch.Tensor:
        everyone.append(rows.clone())
        return rows

    with _loader(drawn, views=AUGMENTATIONS[name], shuffle=Shuffle((0, 1), record)) as one:
        _take(one, _STEPS + 2)
    for rank in range(world):
        crops = iter(everyone)

        def exchange(rows: torch.Tensor, order: np.ndarray, rank: int = rank, crops: Any = crops) -> torch.Tensor:
            of_all = next(crops)
            assert rows.dtype == torch.uint8
            assert torch.equal(rows, of_all.chunk(world)[rank])
            return of_all[order].chunk(world)[rank]

        given = Shuffle((0, 1), exchange, parts=1, only=(1,))
        with _loader(drawn, views=AUGMENTATIONS[name], rank=rank, world=world, shuffle=given) as part:
            for number, (batch, share) in enumerate(zip(alone, _take(part, _STEPS + 2), strict=True)):
                assert share.order is not None
                assert share.order.tolist() == shuffled_rows(3, number, _BATCH).tolist()
                for index in (0, 1):
                    assert torch.equal(share.shuffled[index], batch.views[index][share.order].chunk(world)[rank])
                assert torch.equal(share.views[0], batch.views[0].chunk(world)[rank])
                assert share.views[1] is None


def test_raw_records_give_the_same_ids_and_boxes(drawn: Path, tmp_path: Path, plans: list[Plan]) -> None:
    raw = tmp_path / "raw.beton"
    prepare(f"synthetic:{_SAMPLES}", raw, Settings(mode="raw"), workers=1, quiet=True)
    views = (_CROP_ONLY, _CROP_ONLY)
    found = []
    for path in (drawn, raw):
        plans.clear()
        with _loader(path, views=views, statistics=_LEVELS) as loader:
            batches = _take(loader, _STEPS + 1)
        found.append((batches, list(plans)))
    (jpeg_batches, jpeg_plans), (raw_batches, raw_plans) = found
    assert [batch.ids.tolist() for batch in jpeg_batches] == [batch.ids.tolist() for batch in raw_batches]
    for a, b in zip(jpeg_plans, raw_plans, strict=True):
        assert np.array_equal(a.boxes, b.boxes)
        assert np.array_equal(a.flips, b.flips)
    for x, y in zip(jpeg_batches, raw_batches, strict=True):  # FFCV's decoder takes the fast inverse DCT, Pillow's not
        assert (x.views[0] - y.views[0]).abs().mean() < 2


# ---- going on ----


@pytest.mark.parametrize("position", range(_STEPS + 2))
@pytest.mark.parametrize("begun", [0, 2])
def test_a_loader_goes_on_from_any_saved_position(drawn: Path, position: int, begun: int) -> None:
    """From before the first batch, after each, at the end of the epoch and in the next; in a new or a used loader."""
    with _loader(drawn) as first, _loader(drawn) as second:
        _take(first, position)
        state = json.loads(json.dumps(first.state_dict()))
        assert (state["epoch"], state["step"]) == divmod(position, _STEPS)
        _take(second, begun)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert _equal(_take(first, 3), _take(second, 3))


def test_an_epoch_that_was_left_is_gone_on_with(drawn: Path) -> None:
    with _loader(drawn) as whole, _loader(drawn) as left:
        for batch in left:
            if batch.step == 1:
                break
        rest = list(left)
        assert [batch.step for batch in rest] == list(range(2, _STEPS))
        assert _equal(rest, _take(whole, _STEPS)[2:])


def test_a_state_goes_on_with_another_number_of_ranks_and_workers(drawn: Path) -> None:
    with _loader(drawn) as one, _loader(drawn, rank=1, world=2, workers=2, ahead=2) as two:
        _take(one, 2)
        two.load_state_dict(one.state_dict())
        (whole,), (half,) = _take(one, 1), _take(two, 1)
    assert half.ids.tolist() == whole.ids[_BATCH // 2 :].tolist()
    assert torch.equal(half.views[1], whole.views[1][_BATCH // 2 :])


def test_a_state_with_the_former_name_of_its_order_is_loaded(drawn: Path) -> None:
    with _loader(drawn, order="quasi_random") as loader:
        loader.load_state_dict(loader.state_dict() | {"order": "chunked", "step": 2})
        assert loader.state_dict()["step"] == 2


@pytest.mark.parametrize("settings", [{"seed": 4}, {"batch": 16}])
def test_a_state_of_other_settings_is_refused(drawn: Path, settings: dict[str, int]) -> None:
    name = next(iter(settings))
    with _loader(drawn) as loader, _loader(drawn, **settings) as other:
        before = loader.state_dict()
        with pytest.raises(InputError, match=f"the loader's {name} is .*, the saved one {settings[name]}") as caught:
            loader.load_state_dict(other.state_dict())
        assert loader.state_dict() == before
    assert "\n" not in str(caught.value)


def test_a_state_of_other_data_is_refused(drawn: Path, tmp_path: Path) -> None:
    fewer, quality = tmp_path / "fewer.beton", tmp_path / "quality.beton"
    prepare("synthetic:100", fewer, workers=1, quiet=True)
    prepare(f"synthetic:{_SAMPLES}", quality, Settings(mode="raw"), workers=1, quiet=True)
    with _loader(drawn) as loader:
        for path, what in ((fewer, "samples"), (quality, "fingerprint")):
            with _loader(path) as other, pytest.raises(InputError, match=f"the loader's {what} is"):
                loader.load_state_dict(other.state_dict())


def test_an_empty_state_is_refused(drawn: Path) -> None:
    with _loader(drawn) as loader, pytest.raises(InputError, match="the saved one None"):
        loader.load_state_dict({})


# ---- failing ----


def _place_of(sample: int) -> int:
    """The step of epoch 0 that holds the sample."""
    return int(np.flatnonzero(epoch_order(3, 0, _SAMPLES) == sample)[0]) // _BATCH


_DAMAGED = int(epoch_order(3, 0, _SAMPLES)[3 * _BATCH + 5])  # in step 3


def _flip_byte(path: Path, sample: int) -> None:
    beton = Beton(path)
    with open(path, "r+b") as file:
        file.seek(int(beton.pointers[sample]) + int(beton.sizes[sample]) * 3 // 4)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def _forge_size(path: Path, sample: int) -> None:
    """Have the metadata give the image one more row than its JPEG has."""
    beton = Beton(path)
    row = beton.metadata.dtype
    table = np.memmap(path, dtype=row, mode="r+", offset=beton.header_end - beton.metadata.nbytes, shape=len(beton))
    field = next(name for name in row.names or () if "height" in (row[name].names or ()))
    table[field]["height"][sample] += 1
    table.flush()


def _forge_jpeg(path: Path, sample: int) -> None:
    """Have the JPEG's own frame header give it a tenfold height."""
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
def test_a_damaged_record_is_named_when_it_is_reached(
    copied: Path, damage: Any, manifest: bool, fault: str, figure: Figure
) -> None:
    name = Beton(copied).name(_DAMAGED) if manifest else f"number {_DAMAGED}"
    damage(copied, _DAMAGED)
    if not manifest:
        manifest_path(copied).unlink()
    with _loader(copied, workers=2) as loader:
        assert [batch.step for batch in _take(loader, 3)] == [0, 1, 2]
        start = time.monotonic()
        with pytest.raises(DamagedRecord, match=rf"sample {_DAMAGED} \({name}\) is damaged: .*{fault}") as caught:
            _take(loader, 1)
        took = time.monotonic() - start
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (0, 3)
    assert "\n" not in str(caught.value)
    says = f"{damage.__name__.strip('_')}: error with sample id after {took:.2f} s"
    figure("loader worker raises; loader stalls", says)
    assert took < 1


def test_a_damaged_record_is_met_by_asking_again_too(copied: Path) -> None:
    _flip_byte(copied, _DAMAGED)
    with _loader(copied) as loader:
        _take(loader, 3)
        for _ in range(2):
            with pytest.raises(DamagedRecord, match=f"sample {_DAMAGED} "):
                _take(loader, 1)


def test_the_first_of_several_damaged_records_is_named(copied: Path) -> None:
    first, second = (int(epoch_order(3, 0, _SAMPLES)[place]) for place in (9, 20))
    for sample in (first, second):
        _flip_byte(copied, sample)
    with _loader(copied, workers=2) as loader, pytest.raises(DamagedRecord, match=f"sample {first} "):
        _take(loader, 1)


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Has workers hang until the event is set."""
    go_on, crop = threading.Event(), FfcvBackend._crop

    def hang(*args: Any) -> None:
        assert go_on.wait(20)
        crop(*args)

    monkeypatch.setattr(FfcvBackend, "_crop", hang)
    yield go_on
    go_on.set()


@pytest.mark.reliability
def test_a_stalled_worker_is_an_error_after_the_timeout(drawn: Path, stalled: threading.Event, figure: Figure) -> None:
    with _loader(drawn, stall_timeout=2.5) as loader:
        start = time.monotonic()
        with pytest.raises(LoaderStalled, match=r"no batch for 2\.5 s .*--data\.stall_timeout"):
            _take(loader, 1)
        took = time.monotonic() - start
        stalled.set()
    figure("loader worker raises; loader stalls", f"stall_timeout of 2.5 s: error after {took:.2f} s")
    assert took == pytest.approx(2.5, rel=0.1)


def test_a_loader_that_stalled_gives_the_same_batches_when_asked_again(drawn: Path, stalled: threading.Event) -> None:
    with _loader(drawn, stall_timeout=0.2) as loader, _loader(drawn) as other:
        with pytest.raises(LoaderStalled):
            _take(loader, 1)
        assert loader.state_dict()["step"] == 0
        stalled.set()
        loader.stall_timeout = 20.0
        assert _equal(_take(loader, _STEPS), _take(other, _STEPS))


@pytest.mark.parametrize("error", [ZeroDivisionError, OSError, TimeoutError, MemoryError, KeyError])
def test_any_other_error_of_a_worker_comes_through(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: Any) -> None:
        raise error("as it was raised")

    monkeypatch.setattr(FfcvBackend, "_crop", fail)
    with _loader(drawn) as loader, pytest.raises(error, match="as it was raised"):
        _take(loader, 1)


@pytest.mark.parametrize("batch", [0, -1, _SAMPLES + 1])
def test_a_batch_of_none_or_more_than_all_is_refused(drawn: Path, batch: int) -> None:
    with pytest.raises(InputError, match=f"a batch of {batch} from 200 samples: choose data.batch from 1 to 200"):
        _loader(drawn, batch=batch)


def test_a_batch_of_all_samples_is_an_epoch(drawn: Path) -> None:
    with _loader(drawn, batch=_SAMPLES) as loader:
        (batch,) = list(loader)
    assert sorted(batch.ids.tolist()) == list(range(_SAMPLES))


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match=r"data\.batch 32 does not divide among 3 processes: choose a multiple of 3"):
        _loader(drawn, world=3)


def test_an_unknown_backend_is_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match=r"data\.backend 'tape' is not one of .*ffcv.*: choose one of these"):
        _loader(drawn, backend="tape")
    with pytest.raises(InputError, match=r"data\.backend 'tape' is not one of"):
        CenterLoader(Beton(drawn), size=_SIZE, batch=8, backend="tape")


# ---- running ahead, without growing ----


@pytest.mark.parametrize("ahead", [1, 3])
def test_the_next_epoch_is_under_way_when_one_ends(drawn: Path, plans: list[Plan], ahead: int) -> None:
    with _loader(drawn, ahead=ahead) as loader:
        for number, _ in enumerate(loader, 1):
            assert len(plans) == number + ahead
    order = epoch_order(3, 1, _SAMPLES)
    assert plans[_STEPS].ids.tolist() == order[:_BATCH].tolist()


def test_no_more_batches_than_asked_for_are_under_way(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, submit = 0, FfcvBackend.submit

    def counted(self: FfcvBackend, plan: Plan) -> None:
        nonlocal most
        submit(self, plan)
        most = max(most, len(self._ahead._pending))

    monkeypatch.setattr(FfcvBackend, "submit", counted)
    with _loader(drawn, ahead=2) as loader:
        _take(loader, 2 * _STEPS)
    assert most == 2


def test_buffers_are_made_once(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []
    receive = FfcvBackend.receive

    def watched(self: FfcvBackend, timeout: float) -> tuple[torch.Tensor, ...]:
        crops = receive(self, timeout)
        places.append(crops[0].data_ptr())
        return crops

    monkeypatch.setattr(FfcvBackend, "receive", watched)
    with _loader(drawn, ahead=3) as loader:
        _take(loader, 4 * _STEPS)
    assert len(set(places)) == 4
    assert set(places[:_STEPS]) == set(places[-_STEPS:])


def _threads_and_files() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_twenty_epochs_leave_no_threads_or_files_behind(drawn: Path) -> None:
    with _loader(drawn, batch=100, workers=2) as loader:
        list(loader)
        before = _threads_and_files()
        for _ in range(20):
            list(loader)
            loader.state_dict()
        assert _threads_and_files() == before


def test_closed_and_reset_loaders_leave_no_threads_behind(drawn: Path) -> None:
    before = threading.active_count()
    for _ in range(5):
        with _loader(drawn, workers=2) as loader:
            _take(loader, 1)
            loader.load_state_dict(loader.state_dict())
            assert threading.active_count() == before + 2
            _take(loader, 1)
        assert threading.active_count() == before


@pytest.mark.gpu
def test_views_on_the_gpu_are_those_on_the_cpu(drawn: Path) -> None:
    with (
        _loader(drawn, views=(_CROP_ONLY, _CROP_ONLY)) as host,
        _loader(drawn, views=(_CROP_ONLY, _CROP_ONLY), device="cuda") as device,
    ):
        for a, b in zip(_take(host, 2 * _STEPS), _take(device, 2 * _STEPS), strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            for v, w in zip(a.views, b.views, strict=True):
                assert torch.allclose(v, w.cpu(), atol=1e-5)


# ---- every sample once ----


@pytest.mark.parametrize("share", [1.0, 0.875])
def test_center_crops_are_pillow_s(odd: Path, share: float) -> None:
    beton = Beton(odd)
    with closing(CenterLoader(beton, size=24, batch=4, share=share, workers=1, statistics=_LEVELS)) as loader:
        found = list(loader)
        assert len(loader) == len(found) == 3
    assert [ids.tolist() for _, ids in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for images, ids in found:
        assert images.shape == (len(ids), 3, 24, 24)
        for image, sample in zip(_levels(images), ids.tolist(), strict=True):
            height, width = _SHAPES[sample]
            side = max(1, round(share * min(height, width)))
            box = ((height - side) // 2, (width - side) // 2, side, side)
            assert np.abs(image - _pillow(beton, sample, box, 24)).max() < 1.01


def _center(path: Path, **settings: Any) -> Any:
    chosen: dict[str, Any] = {"size": _SIZE, "batch": 32, "workers": 2, **settings}
    return closing(CenterLoader(Beton(path), **chosen))


def test_every_sample_comes_once_in_order_each_time(drawn: Path) -> None:
    with _center(drawn) as loader:
        once, again = list(loader), list(loader)
    for found in (once, again):
        assert [len(ids) for _, ids in found] == [32] * 6 + [8]
        assert np.concatenate([ids for _, ids in found]).tolist() == list(range(_SAMPLES))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))


@pytest.mark.parametrize("batch", [7, 64, 200, 1000])
@pytest.mark.parametrize("ahead", [1, 3])
def test_center_crops_do_not_depend_on_the_batch(drawn: Path, batch: int, ahead: int) -> None:
    with _center(drawn) as plain, _center(drawn, batch=batch, ahead=ahead) as other:
        assert torch.equal(torch.cat([images for images, _ in plain]), torch.cat([images for images, _ in other]))


def test_chosen_samples_come_in_the_order_given(drawn: Path) -> None:
    chosen = np.array([150, 3, 77, 3, 199])
    with _center(drawn) as whole, _center(drawn, batch=2, indices=chosen) as some, _center(drawn) as none:
        everything = torch.cat([images for images, _ in whole])
        found = list(some)
        none.indices = chosen[:0]
        assert list(none) == []
    assert np.concatenate([ids for _, ids in found]).tolist() == chosen.tolist()
    assert torch.equal(torch.cat([images for images, _ in found]), everything[chosen])


def test_a_center_loader_that_was_left_starts_anew(drawn: Path) -> None:
    with _center(drawn, batch=16) as loader, _center(drawn, batch=16) as other:
        next(iter(loader))
        for (images, ids), (expected, expected_ids) in zip(loader, other, strict=True):
            assert ids.tolist() == expected_ids.tolist()
            assert torch.equal(images, expected)


def test_a_damaged_record_is_named_by_the_center_loader(copied: Path) -> None:
    _flip_byte(copied, 40)
    with _center(copied) as loader, pytest.raises(DamagedRecord, match="sample 40 "):
        list(loader)
