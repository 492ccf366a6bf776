"""A resume with one changed setting: it is free, refused, or refused unless allowed, as the setting is listed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine.training.build as building
from engine.checkpoint import storage
from engine.checkpoint.compatibility import compare_knn_images, compare_settings
from engine.config.cli import flat
from engine.config.settings import Data, Settings
from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.system.errors import InputError
from tests.conftest import Figure
from tests.engine.test_run import SMALL, main

SAVED = flat(Settings(terms=Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual(), dcl=DCL())).as_dict())
FREE = set(  # they change how and where the same is computed, logged and saved
    """out resume allow_change log_every save_every keep keep_every tracker gradient_shares cpu require_gpu compile
    cuda_graph activation_checkpointing collective_timeout step_timeout data.train data.eval data.eval_crop_ratio
    data.verify data.on_bad data.samples data.stall_timeout data.workers data.prefetch_factor data.backend
    data.hw_decoder_load knn.every knn.k knn.temperature knn.limit knn.bank probe.every probe.lr tracking.project
    tracking.name tracking.group tracking.tags tracking.images""".split()  # noqa: SIM905 - a list of words
)
FIXED = set(  # the saved state would not fit
    """method.name method.queue_size method.queue_dtype optim.name data.batch data.order seed model.arch model.stem
    model.width model.dim model.mlp_dim model.bn model.zero_init_residual model.stop_grad_conv1 model.init
    model.init_which model.init_heads model.init_prefix""".split()  # noqa: SIM905
)


def other(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 7] if isinstance(value, list) else f"{value}x"


def resumed(key: str, allow: list[str] | None = None) -> Any:
    """Return settings that differ from the saved ones in that key alone."""
    now = SAVED | {key: other(SAVED[key]), "allow_change": allow or []}
    return SimpleNamespace(as_dict=lambda: now, allow_change=allow or [])


def outcome(key: str) -> str:
    """Return the outcome of a change; one that may be allowed needs its key or section."""
    then, now = SAVED[key], other(SAVED[key])
    try:
        assert not compare_settings(resumed(key), SAVED)
        return "free"
    except InputError as error:
        message = str(error)
    if message == f"{key} {now!r}: the checkpoint has {then!r}: resume with that value":
        with pytest.raises(InputError):
            compare_settings(resumed(key, [key]), SAVED)
        return "fixed"
    listed = f"{key} {then!r} -> {now!r}"
    assert message == f"the checkpoint has other settings: {listed}: resume with its own, or add --allow-change {key}"
    with pytest.raises(InputError):
        compare_settings(resumed(key, ["optim.l", "seed"]), SAVED)
    for allowed in (key, key.split(".")[0]):
        assert compare_settings(resumed(key, [allowed]), SAVED) == f"resuming with other settings: {listed}"
    return "allowed"


@pytest.mark.reliability
def test_every_setting_is_free_fixed_or_allowed(figure: Figure) -> None:
    outcomes = {key: outcome(key) for key in SAVED if key not in ("allow_change", "resume")}
    kinds = ("free", "fixed", "allowed")
    assert outcomes == {key: kinds[0 if key in FREE else 1 if key in FIXED else 2] for key in outcomes}
    counts = [list(outcomes.values()).count(kind) for kind in kinds]
    figure(
        "resume with each setting changed",
        "all {} keys: {} free, {} refused, {} refused unless allowed".format(len(outcomes), *counts),
    )


@pytest.mark.reliability
def test_other_images_for_knn_are_refused_or_allowed(
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figure: Figure,
) -> None:
    for name, count in (("other", 190), ("third", 180)):
        prepare(f"synthetic:{count}", tmp_path / f"{name}.beton", workers=1, quiet=True)
    (tmp_path / "moved.beton").symlink_to(drawn)

    def resumed(epochs: int, *evaluation: str | Path) -> tuple[int, str]:
        where = ["--data.train", str(drawn), "--out", str(tmp_path / "out"), "--resume", "auto"]
        more = ["--optim.epochs", str(epochs), "--allow-change", "optim.epochs", *map(str, evaluation)]
        return main(monkeypatch, *where, *SMALL, *more), capsys.readouterr().err

    assert resumed(1, "--data.eval", drawn)[0] == 0
    assert resumed(2, "--data.eval", tmp_path / "moved.beton")[0] == 0  # the same images elsewhere
    status, err = resumed(3, "--data.eval", tmp_path / "other.beton")
    assert status == 2
    assert "data.eval" in err
    assert "give those, or add --allow-change data.eval" in err
    assert resumed(3)[0] == 0  # no kNN: its images stay those of before
    status, err = resumed(4, "--data.eval", tmp_path / "other.beton")
    assert status == 2
    fingerprints = [Beton(path).fingerprint for path in (tmp_path / "other.beton", drawn)]
    assert "fingerprint {}, there {}".format(*fingerprints) in err
    status, err = resumed(4, "--data.eval", tmp_path / "other.beton", "--allow-change", "data.eval")
    assert status == 0
    assert "kNN classifies these from here on" in err
    assert resumed(5, "--data.eval", tmp_path / "third.beton")[0] == 2
    figure("resume with each setting changed", "other images for kNN: refused unless allowed; the same elsewhere: free")


def test_resume_is_refused_before_the_data_are_verified(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("synthetic:190", tmp_path / "other.beton", workers=1, quiet=True)
    out = ["--out", str(tmp_path / "out"), *SMALL, "--optim.epochs", "1"]
    assert main(monkeypatch, "--data.train", str(drawn), "--data.eval", str(drawn), *out) == 0
    verified, hashed, sha256 = [], [], storage._sha256
    monkeypatch.setattr(building, "verify_datasets", lambda *_: verified.append(1))
    monkeypatch.setattr(storage, "_sha256", lambda path: hashed.append(path) or sha256(path))
    resumed = [*out, "--resume", "auto", "--data.verify", "full"]
    for train, evaluation, more, message in (
        (drawn, drawn, ["--seed", "1"], "seed 1: the checkpoint has 0"),
        (drawn, drawn, ["--optim.lr", "0.1"], "other settings: optim.lr 0.32 -> 0.1"),
        (drawn, tmp_path / "other.beton", [], "data.eval"),
        (tmp_path / "other.beton", drawn, [], "data.train"),
        (drawn, drawn, ["--resume", str(tmp_path)], "not a checkpoint"),
    ):
        data = ["--data.train", str(train), "--data.eval", str(evaluation)]
        assert main(monkeypatch, *resumed, *data, *more) == 2
        assert message in capsys.readouterr().err
    assert not verified + hashed
    changed = ["--optim.lr", "0.1", "--allow-change", "optim.lr"]
    assert main(monkeypatch, *resumed, "--data.train", str(drawn), "--data.eval", str(drawn), *changed) == 0
    assert verified
    assert capsys.readouterr().err.count("warning: resuming with other settings: optim.lr 0.32 -> 0.1") == 1


def test_older_checkpoint_without_knn_images_is_accepted() -> None:
    compare_knn_images(Settings(), "a", "")


def test_listed_settings_exist() -> None:
    assert not (FREE | FIXED) - SAVED.keys()


def test_settings_that_an_older_checkpoint_lacks_had_their_defaults() -> None:
    older = Settings().as_dict()
    for key in ("views", "mean", "std"):
        del older["data"][key]
    assert not compare_settings(Settings(), older)
    for data in (Data(views=[{}, {"hue": 0}]), Data(std=[0.5, 0.5, 0.5])):
        with pytest.raises(InputError, match=r"other settings: data\.(views \[\]|std \[0.229, 0.224, 0.225\]) ->"):
            compare_settings(Settings(data=data), older)


@pytest.mark.parametrize("terms", [(Terms(), Terms(co2=CO2())), (Terms(co2=CO2()), Terms())], ids=["added", "removed"])
def test_added_or_removed_term_is_a_difference(terms: tuple[Terms, Terms]) -> None:
    then, now = (replace(Settings(), terms=chosen) for chosen in terms)
    with pytest.raises(InputError, match=r"other settings: .*terms\.co2\.weight .* -> .*--allow-change terms\.co2"):
        compare_settings(now, then.as_dict())
