"""Data sets are verified before training, on every machine; the loader gives the views that a run needs."""

from __future__ import annotations

import json
import os
import platform
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config.settings import Data, Knn, Optim, Settings
from engine.parallel import accelerator, collectives
from engine.parallel.rendezvous import rank
from engine.training.build import Run, build
from engine.training.datasets import Datasets, open_datasets, verify_datasets
from engine.training.dry_run import dry_run
from methods.norm import SplitBatchNorm
from methods.registry import Terms
from methods.residual import Residual
from pipeline.beton import Beton
from pipeline.inspect import verify
from pipeline.loader import Loader
from pipeline.sampling.order import shuffled_rows
from pipeline.storage.encode import Record
from pipeline.storage.writer import BetonWriter
from pipeline.system.errors import DamagedRecord, InputError
from pipeline.views import AUGMENTATIONS
from tests.conftest import Figure
from tests.engine.training import runs
from tests.gloo import on_ranks
from tests.side_files import copy_side_files, write_side_files

COPIES = 25


@pytest.fixture(scope="module")
def many(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of 5000 records: those of `drawn`, 25 times."""
    source, path = Beton(drawn), tmp_path_factory.mktemp("many") / "many.beton"
    writer, crcs = BetonWriter(path, COPIES * len(source)), []
    for index in range(COPIES * len(source)):
        sample = index % len(source)
        data = source.record(sample).tobytes()
        crcs.append(zlib.crc32(data))
        sides = int(source.heights[sample]), int(source.widths[sample])
        writer.append(Record(data, int(source.modes[sample]), *sides, crcs[-1]), int(source.labels[sample]))
    names = [f"{index}.jpg" for index in range(len(crcs))]
    write_side_files(path, source.classes, writer.close(), names, crcs)
    return path


def damaged(path: Path, to: Path, samples: list[int]) -> Path:
    """Write a copy with a bit flipped in each of those records."""
    beton, data = Beton(path), bytearray(path.read_bytes())
    for sample in samples:
        data[int(beton.pointers[sample]) + int(beton.sizes[sample]) // 2] ^= 4
    to.write_bytes(data)
    copy_side_files(path, to)
    return to


def settings(path: Path, **data: str) -> Settings:
    return Settings(data=Data(train=str(path), batch=20, verify="full", **data), knn=Knn(every=0))  # type: ignore[arg-type]


def verified(chosen: Settings) -> Datasets:
    data = open_datasets(chosen, torch.device("cpu"))
    verify_datasets(chosen, data)
    return data


def read_ids(beton: Beton, rank: int, world: int) -> np.ndarray:
    """Return the records that a rank reads in an epoch, [steps, share of a batch]."""
    options = {"size": 8, "batch": 100, "workers": 1, "rank": rank, "world": world}
    with closing(Loader(beton, AUGMENTATIONS["moco_v2_32"], on_bad="skip", **options)) as loader:  # type: ignore[arg-type]
        return np.stack([batch.ids for batch in loader])


@pytest.mark.reliability
@pytest.mark.parametrize("count", [*(pytest.param(count, marks=pytest.mark.slow) for count in (1, 5)), 50])
def test_exactly_the_damaged_records_are_found_and_skipped(
    count: int, many: Path, tmp_path: Path, figure: Figure, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = sorted(np.random.default_rng(count).permutation(len(Beton(many)))[:count].tolist())
    path = damaged(many, tmp_path / "bad.beton", bad)
    listed = [sample for sample, _ in verify(Beton(path), quiet=True)]
    assert listed == bad
    with pytest.raises(InputError, match=f"{count} of {len(Beton(path))} records are damaged, samples {bad[0]}"):
        verified(settings(path))
    beton = verified(settings(path, on_bad="skip")).train
    assert f"{count} of {len(beton)} records are damaged" in capsys.readouterr().err
    one, *two = (read_ids(beton, *place) for place in ((0, 1), (0, 2), (1, 2)))
    assert not np.isin(one, bad).any()
    assert (np.concatenate(two, axis=1) == one).all()
    unverified = read_ids(Beton(path, tolerate=True), 0, 1)  # finds each when it reads it
    assert (unverified == one).all()
    hits = len(set(listed) & set(bad))
    quality = f"recall {hits / count:g}, precision {hits / len(listed):g}"
    figure("1, 5, 50 damaged records", f"{count} damaged: {quality}; same substitutes on 1 and 2 ranks")


def test_too_many_damaged_records_are_refused(many: Path, tmp_path: Path) -> None:
    path = damaged(many, tmp_path / "bad.beton", list(range(0, 5000, 99)))
    with pytest.raises(InputError, match="51 damaged records, the first of them 0, and at most 50 are skipped"):
        verified(settings(path, on_bad="skip"))


def test_intact_set_is_verified_without_a_warning(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = verified(replace(settings(drawn), knn=Knn()))
    assert (len(data.train), data.eval, data.train.unreadable) == (200, None, frozenset())
    assert "warning" not in capsys.readouterr().err


def test_data_set_for_knn_is_verified_too(drawn: Path, many: Path, tmp_path: Path) -> None:
    path = damaged(drawn, tmp_path / "bad.beton", [7])
    with pytest.raises(InputError, match=r"bad\.beton: 1 of 200 records are damaged, samples 7 "):
        verified(replace(settings(many, eval=str(path)), knn=Knn()))


def test_quick_check_leaves_damage_to_the_reading(drawn: Path, tmp_path: Path) -> None:
    path = damaged(drawn, tmp_path / "bad.beton", [7])
    beton = verified(replace(settings(path), data=Data(train=str(path), batch=20))).train
    with pytest.raises(DamagedRecord, match="sample 7 "), closing(whole_batch(beton)) as loader:
        next(iter(loader))


def whole_batch(beton: Beton) -> Loader:
    return Loader(beton, AUGMENTATIONS["moco_v2_32"], size=8, batch=len(beton), workers=1, backend="ffcv")


def test_record_that_is_damaged_during_the_run_is_found(drawn: Path, tmp_path: Path) -> None:
    path = damaged(drawn, tmp_path / "sound.beton", [])
    beton = Beton(path)
    with closing(whole_batch(beton)) as loader:
        epochs = (batch for _ in range(9) for batch in loader)
        for _ in range(3):
            next(epochs)
        with open(path, "r+b") as file:
            file.seek(int(beton.pointers[90]) + 30)
            file.write(b"\0\1\2\3")
        with pytest.raises(DamagedRecord, match="sample 90 "):
            list(epochs)


def open_copies(paths: list[str], out: str, on_bad: str) -> None:
    """Open one machine's copy; each rank is alone on its machine."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    try:
        result: object = sorted(verified(settings(Path(paths[rank()]), on_bad=on_bad)).train.unreadable)
    except InputError as error:
        result = str(error)
    Path(out, str(rank())).write_text(json.dumps(result))


@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_record_that_is_damaged_on_one_machine_is_skipped_on_all(on_bad: str, drawn: Path, tmp_path: Path) -> None:
    copies = [str(damaged(drawn, tmp_path / f"{n}.beton", bad)) for n, bad in enumerate(([3], [150, 4]))]
    out = tmp_path / "out"
    out.mkdir()
    on_ranks(2, open_copies, copies, str(out), on_bad)
    one, other = (json.loads((out / str(number)).read_text()) for number in range(2))
    if on_bad == "skip":
        assert one == other == [3, 4, 150]
    else:
        assert one == other.replace("1.beton", "0.beton")
        assert f"3 of 200 records are damaged, samples 3, 4, 150 (the first, {Beton(drawn).name(3)}: " in one
        assert f", on {platform.node()}" in one


def levels(chosen: Settings) -> torch.Tensor:
    """Return the first batch's views as levels of 0 to 255, by the run's own normalization; check kNN's loader too."""
    run = build(chosen)
    try:
        statistics = run.settings.data.statistics
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
        assert run.data.knn is None or run.data.knn._loader["statistics"] == statistics
        return (torch.stack(next(iter(run.loader)).views) * std + mean) * 255
    finally:
        run.close()


def test_views_are_changed_and_normalized_as_set(drawn: Path) -> None:
    chosen = runs.settings(drawn, "plain")
    unchanged = levels(chosen)
    data = replace(chosen.data, mean=[0.1, 0.5, 0.9], std=[0.5, 1.0, 0.2], eval=str(drawn))
    assert torch.allclose(levels(replace(chosen, data=data, knn=Knn(k=5))), unchanged, atol=1e-3)
    view = {"hflip": 1, "jitter_p": 0, "gray_p": 0}
    flipped, turned = (
        levels(replace(chosen, data=replace(chosen.data, views=[view, view | more]))) for more in ({}, {"vflip": 1})
    )
    assert torch.equal(turned[0], flipped[0])
    assert (turned[1].flip(2) - flipped[1]).abs().max() < 0.01
    assert not torch.equal(flipped[1], unchanged[1])


def test_measured_colors_normalize_the_run(drawn: Path, tmp_path: Path) -> None:
    manifest = Beton(drawn).manifest
    assert manifest is not None
    chosen = runs.settings(drawn, "plain")
    assert torch.allclose(
        levels(replace(chosen, data=replace(chosen.data, mean="auto", std="auto"))), levels(chosen), atol=1e-3
    )
    measured = open_datasets(
        replace(chosen, data=replace(chosen.data, mean="auto", std=[0.5, 0.5, 0.5])), torch.device("cpu")
    ).settings.data
    assert (measured.mean, measured.std) == (manifest.mean, [0.5, 0.5, 0.5])
    (tmp_path / "bare.beton").write_bytes(drawn.read_bytes())
    data = replace(chosen.data, train=str(tmp_path / "bare.beton"), std="auto")
    for open_ in (lambda s: build(s).close(), dry_run):
        with pytest.raises(InputError, match=r"data.std auto: .*bare.beton has no measured colors: write .* or give"):
            open_(replace(chosen, data=data))


def groups(run: Run) -> set[int]:
    return {m.groups for m in run.model.online.modules() if isinstance(m, SplitBatchNorm)}


@pytest.mark.parametrize(
    ("bn", "terms", "symmetric", "shuffled", "plain"),
    [
        ("plain", Terms(), False, set(), {0, 1}),
        ("sync", Terms(), False, set(), {0, 1}),
        ("shuffle", Terms(), False, {1}, {0}),
        ("split", Terms(), False, {1}, {0}),
        ("shuffle", Terms(residual=Residual()), False, {0, 1}, {0}),
        ("shuffle", Terms(), True, {0, 1}, {0, 1}),
    ],
)
def test_only_needed_views_come_shuffled_or_plain(
    bn: str, terms: Terms, symmetric: bool, shuffled: set[int], plain: set[int], drawn: Path
) -> None:
    run = build(runs.settings(drawn, bn, terms, symmetric=symmetric))
    try:
        batch = next(iter(run.loader))
        assert set(batch.shuffled) == shuffled
        assert {index for index, view in enumerate(batch.views) if view is not None} == plain
        assert (batch.order is not None) == bool(shuffled)
        assert groups(run) == ({8} if shuffled else set())
    finally:
        run.close()


def run_shuffled(beton: str, out: str, bn: str) -> None:
    """Train three steps; write the losses, the order of the last batch and the groups."""
    run = build(runs.settings(Path(beton), bn))
    losses = []
    for _, batch in zip(range(3), run.loader, strict=False):
        losses.append(collectives.mean(run.model.step(batch).parts["loss"]).item())
    run.close()
    torch.save(
        {"losses": losses, "order": torch.from_numpy(batch.order), "groups": sorted(groups(run))},
        Path(out) / f"{rank()}.pt",
    )


@pytest.mark.parametrize("bn", ["shuffle", "split"])
def test_two_ranks_shuffle_over_both_or_within_each(bn: str, drawn: Path, tmp_path: Path) -> None:
    on_ranks(2, run_shuffled, str(drawn), str(tmp_path), bn)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    assert torch.equal(first["order"], second["order"])
    (tmp_path / "alone").mkdir()
    run_shuffled(str(drawn), str(tmp_path / "alone"), bn)
    alone = torch.load(tmp_path / "alone" / "0.pt", weights_only=True)
    if bn == "shuffle":  # eight parts of the global batch either way
        assert (first["groups"], alone["groups"]) == ([4], [8])
        assert first["order"].tolist() == alone["order"].tolist() == shuffled_rows(0, 2, 32).tolist()
        assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    else:
        assert (first["groups"], alone["groups"]) == ([8], [8])
        assert first["order"].tolist() == shuffled_rows(0, 2, 32, parts=2).tolist()
        assert np.ptp(first["order"][:16].numpy()) < 16


def test_views_grow_over_training_and_have_the_encoders_precision(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: True)
    chosen = runs.settings(drawn, "plain")
    grown = replace(chosen.data, size=24, sizes=[8, 16, 24])
    run = build(replace(chosen, data=grown, optim=Optim(lr=0.05, epochs=5), precision="bf16"))
    views = []
    try:
        for _ in range(5):
            for batch in run.loader:
                assert run.model.step(batch).taken
            views.append((batch.views[0].shape[-1], batch.views[1].dtype))
    finally:
        run.close()
    assert views == [(size, torch.bfloat16) for size in (8, 8, 16, 16, 24)]


def test_views_in_the_encoders_precision_give_the_same_step(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "bfloat16_on_cpu", lambda: True)
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("engine.training.datasets.DTYPES", {"bf16": dtype})
        run = build(replace(runs.settings(drawn, "plain"), precision="bf16"))
        batch = next(iter(run.loader))
        assert batch.views[0].dtype == dtype
        losses.append(run.model.step(batch).parts["loss"])
        run.close()
    assert torch.equal(*losses)
