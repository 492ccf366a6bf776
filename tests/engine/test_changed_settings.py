"""A resume with any one setting changed: the difference is told, and refused or allowed as the setting is listed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from engine.arguments import flat
from engine.config import Settings
from engine.state import _compare
from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import Terms
from methods.residual import Residual
from methods.xmoco import XMoCo
from pipeline.errors import InputError
from tests.conftest import Figure

SAVED = flat(Settings(terms=Terms(co2=CO2(), xmoco=XMoCo(), residual=Residual(), dcl=DCL())).as_dict())
FREE = set(  # how and where the same is computed, told and kept
    """out resume allow_change log_every save_every keep keep_every tracker gradient_shares cpu compile cuda_graph
    recompute collective_timeout step_timeout data.train data.eval data.eval_share data.verify data.on_bad data.samples
    data.stall_timeout data.workers data.ahead data.backend data.crop_on data.hardware_load knn.every knn.k
    knn.temperature knn.limit""".split()  # noqa: SIM905 - a list of words
)
FIXED = set(  # what is saved would not fit
    """method.name method.queue method.queue_dtype optim.name data.batch data.order seed model.arch model.stem
    model.width model.dim model.hidden model.bn model.zero_init model.frozen_patch""".split()  # noqa: SIM905
)


def other(value: Any) -> Any:
    """Return another value than this."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 7] if isinstance(value, list) else f"{value}x"


def resumed(key: str, allow: list[str] | None = None) -> Any:
    """Return a run whose settings differ in that key alone from those saved."""
    now = SAVED | {key: other(SAVED[key]), "allow_change": allow or []}
    return SimpleNamespace(settings=SimpleNamespace(as_dict=lambda: now, allow_change=allow or []))


def outcome(key: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what comes of a change; of those that may be allowed, that they are with their key or section alone."""
    then, now = SAVED[key], other(SAVED[key])
    try:
        _compare(resumed(key), SAVED)
    except InputError as error:
        said = str(error)
    else:
        assert not capsys.readouterr().err
        return "free"
    if said == f"{key} {now!r}: the checkpoint has {then!r}: resume with that value":
        with pytest.raises(InputError):
            _compare(resumed(key, [key]), SAVED)
        return "fixed"
    listed = f"{key} {then!r} -> {now!r}"
    assert said == f"the checkpoint has other settings: {listed}: resume with its own, or add --allow-change {key}"
    with pytest.raises(InputError):
        _compare(resumed(key, ["optim.l", "seed"]), SAVED)
    for allowed in (key, key.split(".")[0]):
        _compare(resumed(key, [allowed]), SAVED)
        assert capsys.readouterr().err == f"warning: resuming with other settings: {listed}\n"
    return "allowed where asked for"


@pytest.mark.reliability
def test_every_setting_is_free_fixed_or_allowed_where_asked_for(
    figure: Figure, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {key: outcome(key, capsys) for key in SAVED if key not in ("allow_change", "resume")}
    expected = {key: "free" if key in FREE else "fixed" if key in FIXED else "allowed where asked for" for key in found}
    assert found == expected
    counts = [sum(kind == name for kind in found.values()) for name in ("free", "fixed", "allowed where asked for")]
    figure(
        "resume with each setting changed",
        "all {} keys: {} free, {} refused, {} refused unless allowed".format(len(found), *counts),
    )


def test_the_lists_name_settings_that_there_are() -> None:
    assert not (FREE | FIXED) - SAVED.keys()


@pytest.mark.parametrize("terms", [(Terms(), Terms(co2=CO2())), (Terms(co2=CO2()), Terms())], ids=["added", "removed"])
def test_a_term_more_or_less_is_a_difference(terms: tuple[Terms, Terms]) -> None:
    then, now = (replace(Settings(), terms=chosen) for chosen in terms)
    with pytest.raises(InputError, match=r"other settings: .*terms\.co2\.weight .* -> .*--allow-change terms\.co2"):
        _compare(SimpleNamespace(settings=now), then.as_dict())  # type: ignore[arg-type]
