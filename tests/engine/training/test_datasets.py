"""Data sets that are verified before training: exactly the damaged records are found, on whichever machine."""

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

from engine.config.settings import Data, Knn, Settings
from engine.training.datasets import open_sets, verify_sets
from pipeline.beton import Beton, Manifest, manifest_path
from pipeline.inspect import verify
from pipeline.loader import Loader
from pipeline.storage.encode import Record
from pipeline.storage.writer import BetonWriter
from pipeline.system.errors import DamagedRecord, InputError
from pipeline.views import AUGMENTATIONS
from tests.conftest import Figure
from tests.gloo import on_ranks

COPIES = 25


@pytest.fixture(scope="module")
def many(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of 5000 records: those of `drawn`, over and over."""
    source, path = Beton(drawn), tmp_path_factory.mktemp("many") / "many.beton"
    writer, crcs = BetonWriter(path, COPIES * len(source)), []
    for index in range(COPIES * len(source)):
        at = index % len(source)
        data = source.record(at).tobytes()
        crcs.append(zlib.crc32(data))
        sides = int(source.heights[at]), int(source.widths[at])
        writer.append(Record(data, int(source.modes[at]), *sides, crcs[-1]), int(source.labels[at]))
    names = [f"{index}.jpg" for index in range(len(crcs))]
    header = writer.close()
    Manifest(len(crcs), source.classes, header, path.stat().st_size, {}, {}, crcs, names).write(manifest_path(path))
    return path


def damaged(path: Path, to: Path, samples: list[int]) -> Path:
    """Write a copy with a bit flipped in each of those records."""
    beton, data = Beton(path), bytearray(path.read_bytes())
    for sample in samples:
        data[int(beton.pointers[sample]) + int(beton.sizes[sample]) // 2] ^= 4
    to.write_bytes(data)
    manifest_path(to).write_bytes(manifest_path(path).read_bytes())
    return to


def settings(path: Path, **data: str) -> Settings:
    return Settings(data=Data(train=str(path), verify="full", **data), knn=Knn(every=0))  # type: ignore[arg-type]


def verified(chosen: Settings) -> tuple[Beton, Beton | None]:
    sets = open_sets(chosen)
    verify_sets(chosen, *sets)
    return sets


def seen(beton: Beton, rank: int, world: int) -> np.ndarray:
    """Return the records that one process reads in an epoch, [steps, share of a batch]."""
    options = {"size": 8, "batch": 100, "workers": 1, "rank": rank, "world": world}
    with closing(Loader(beton, AUGMENTATIONS["moco_v2_32"], on_bad="skip", **options)) as loader:  # type: ignore[arg-type]
        return np.stack([batch.ids for batch in loader])


@pytest.mark.reliability
@pytest.mark.parametrize("count", [1, 5, 50])
def test_exactly_the_damaged_records_are_found_and_passed_over_alike(
    count: int, many: Path, tmp_path: Path, figure: Figure, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = sorted(np.random.default_rng(count).permutation(len(Beton(many)))[:count].tolist())
    path = damaged(many, tmp_path / "bad.beton", bad)
    found = [sample for sample, _ in verify(Beton(path), quiet=True)]
    assert found == bad
    with pytest.raises(InputError, match=f"{count} of {len(Beton(path))} records are damaged, samples {bad[0]}"):
        verified(settings(path))
    beton, _ = verified(settings(path, on_bad="skip"))
    assert f"{count} of {len(beton)} records are damaged" in capsys.readouterr().err
    one, *two = (seen(beton, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert not np.isin(one, bad).any()
    assert (np.concatenate(two, axis=1) == one).all()
    unverified = seen(Beton(path, tolerate=True), 0, 1)  # which meets each when it comes to it
    assert (unverified == one).all()
    hits = len(set(found) & set(bad))
    says = (
        f"{count} damaged: recall {hits / count:g}, precision {hits / len(found):g}; same substitutes on 1 and 2 ranks"
    )
    figure("1, 5, 50 damaged records", says)


def test_too_many_damaged_records_are_refused_with_either_policy(many: Path, tmp_path: Path) -> None:
    path = damaged(many, tmp_path / "bad.beton", list(range(0, 5000, 99)))
    with pytest.raises(InputError, match="51 damaged records, the first of them 0, and at most 50 are skipped"):
        verified(settings(path, on_bad="skip"))


def test_a_whole_set_is_verified_in_silence(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, evaluation = verified(replace(settings(drawn), knn=Knn()))
    assert (len(train), evaluation, train.unreadable) == (200, None, frozenset())
    assert "warning" not in capsys.readouterr().err


def test_the_set_for_knn_is_verified_too(drawn: Path, many: Path, tmp_path: Path) -> None:
    path = damaged(drawn, tmp_path / "bad.beton", [7])
    with pytest.raises(InputError, match=r"bad\.beton: 1 of 200 records are damaged, samples 7 "):
        verified(replace(settings(many, eval=str(path)), knn=Knn()))


def test_a_quick_check_leaves_damage_to_the_reading(drawn: Path, tmp_path: Path) -> None:
    path = damaged(drawn, tmp_path / "bad.beton", [7])
    beton, _ = verified(replace(settings(path), data=Data(train=str(path))))
    with pytest.raises(DamagedRecord, match="sample 7 "), closing(_all_of(beton)) as loader:
        next(iter(loader))


def _all_of(beton: Beton) -> Loader:
    return Loader(beton, AUGMENTATIONS["moco_v2_32"], size=8, batch=len(beton), workers=1, backend="ffcv")


def test_a_record_that_goes_bad_in_mid_run_is_caught(drawn: Path, tmp_path: Path) -> None:
    path = damaged(drawn, tmp_path / "sound.beton", [])
    beton = Beton(path)
    with closing(_all_of(beton)) as loader:
        epochs = (batch for _ in range(9) for batch in loader)
        for _ in range(3):
            next(epochs)
        with open(path, "r+b") as file:
            file.seek(int(beton.pointers[90]) + 30)
            file.write(b"\0\1\2\3")
        with pytest.raises(DamagedRecord, match="sample 90 "):
            list(epochs)


def open_copies(paths: list[str], out: str, on_bad: str) -> None:
    """Open one machine's copy; each process is alone on its machine."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    own = paths[int(os.environ["RANK"])]
    try:
        beton, _ = verified(settings(Path(own), on_bad=on_bad))
        told = {"unreadable": sorted(beton.unreadable)}
    except InputError as error:
        told = {"error": str(error)}
    Path(out, os.environ["RANK"]).write_text(json.dumps(told))


@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_a_record_that_is_damaged_on_one_machine_is_passed_over_on_all(
    on_bad: str, drawn: Path, tmp_path: Path
) -> None:
    copies = [str(damaged(drawn, tmp_path / f"{n}.beton", bad)) for n, bad in enumerate(([3], [150, 4]))]
    out = tmp_path / "out"
    out.mkdir()
    on_ranks(2, open_copies, copies, str(out), on_bad)
    one, other = (json.loads((out / str(rank)).read_text()) for rank in range(2))
    if on_bad == "skip":
        assert one == other == {"unreadable": [3, 4, 150]}
    else:
        assert one == other
        assert f"3 of 200 records are damaged, samples 3, 4, 150 (the first, {Beton(drawn).name(3)}: " in one["error"]
        assert f", on {platform.node()}" in one["error"]
