"""Former names: refused where a user writes them, translated where an earlier run wrote them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.checkpoint import storage
from engine.checkpoint.compatibility import compare_settings
from engine.config.cli import flat, parse
from engine.config.renamed import RENAMED, translate
from engine.config.settings import Settings
from engine.report.run_folder import read_runs
from engine.weights.readers import read
from pipeline.system.errors import InputError


def former(settings: Settings, **data: Any) -> dict[str, Any]:
    """Return settings as an earlier version wrote them; data: former settings of that section."""
    old: dict[str, Any] = {}
    names = {present: key for key, present in RENAMED.items()}
    for key, value in flat(settings.as_dict()).items():
        section, _, name = names.get(key, key).rpartition(".")
        within = old
        for part in filter(None, section.split(".")):
            within = within.setdefault(part, {})
        within[name] = value
    old["data"] |= data
    return old


def test_every_present_name_is_a_setting() -> None:
    known = flat(Settings().as_dict())
    assert set(RENAMED.values()) <= known.keys()
    assert not RENAMED.keys() & known.keys()


@pytest.mark.parametrize("key", RENAMED)
def test_former_names_are_refused(key: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    section, _, name = key.rpartition(".")
    recipe.write_text(f"{section}: {{{name}: 1}}" if section else f"{name}: 1")
    for given in ([f"--{key}", "1"], [f"--{key.replace('_', '-')}=1"], ["--config", str(recipe)]):
        with pytest.raises(InputError) as refused:
            parse(given)
        assert str(refused.value).replace(f" ({recipe})", "") == f"{key}: renamed to {RENAMED[key]}"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("order", "chunked", "data.order 'chunked': renamed to quasi_random"),
        ("crop_on", "cpu", "data.crop_on: now part of data.backend: write data.backend ffcv"),
        ("crop_on", "gpu", "data.crop_on: now part of data.backend: write data.backend ffcv_gpu"),
        ("crop_on", "auto", "data.crop_on: now part of data.backend: leave it out"),
    ],
)
def test_former_values_are_refused(key: str, value: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"data: {{{key}: {value}}}")
    for given in ([f"--data.{key}", value], [f"--data.{key}={value}"], ["--config", str(tmp_path / "r.yaml")]):
        with pytest.raises(InputError) as refused:
            parse(given)
        assert str(refused.value).replace(f" ({tmp_path / 'r.yaml'})", "") == says


def test_settings_of_an_earlier_run_are_translated() -> None:
    settings = parse(["--method.name", "moco_v3", "--terms", "[residual]", "--data.order", "quasi_random"])
    old = former(settings, order="chunked", crop_on="auto")
    assert RENAMED.keys() <= flat(old).keys()
    assert flat(translate(old)) == flat(settings.as_dict())
    assert old["data"]["order"] == "chunked"  # as it was
    assert translate(settings.as_dict()) == settings.as_dict()


@pytest.mark.parametrize(
    ("backend", "crop_on", "gpu", "present"),
    [
        ("auto", "auto", True, "auto"),
        ("auto", "gpu", True, "auto"),
        ("auto", "cpu", True, "ffcv"),
        ("ffcv", "cpu", True, "ffcv"),
        ("ffcv", "gpu", True, "ffcv_gpu"),
        ("ffcv", "gpu", False, "ffcv_gpu"),
        ("ffcv", "auto", True, "ffcv_gpu"),
        ("ffcv", "auto", False, "ffcv"),
        ("dali", "cpu", False, "dali"),
        ("resident", "gpu", True, "resident"),
    ],
)
def test_backend_and_crop_on_are_one_setting(
    backend: str, crop_on: str, gpu: bool, present: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert translate({"data": {"backend": backend, "crop_on": crop_on}}) == {"data": {"backend": present}}


@pytest.mark.parametrize(
    "settings", [{}, {"data": None}, {"data": [1]}, {"data": 3, "optim": "x"}, {"data": {"order": []}}]
)
def test_other_values_are_left_alone(settings: dict[str, Any]) -> None:
    assert translate(settings) == settings


def test_a_config_of_an_earlier_run_is_read_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = parse(["--optim.clip-grad-norm", "2", "--data.order", "quasi_random"])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(former(settings, order="chunked", crop_on="cpu")))
    with caplog.at_level(logging.WARNING):
        translated = parse(["--config", str(config), "--seed", "3"])
    assert (translated.optim.clip_grad_norm, translated.data.order, translated.data.backend, translated.seed) == (
        2,
        "quasi_random",
        "ffcv",
        3,
    )
    (record,) = caplog.records
    assert all(f"{old} is {present}" in record.getMessage() for old, present in RENAMED.items())


def test_a_changed_config_of_an_earlier_run_is_refused(tmp_path: Path) -> None:
    old = former(Settings(), crop_on="auto")
    del old["optim"]["clip"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(InputError, match="renamed to"):
        parse(["--config", str(tmp_path / "config.yaml")])


def test_files_of_an_earlier_run_are_read_under_the_present_names(tmp_path: Path) -> None:
    settings = parse(["--optim.clip-grad-norm", "2", "--data.eval-crop-ratio", "1", "--data.order", "quasi_random"])
    old = former(settings, order="chunked", crop_on="auto")
    compare_settings(settings, old)
    with pytest.raises(InputError, match=r"other settings: optim\.clip_grad_norm 2\.0 -> 3\.0: .*--allow-change optim"):
        compare_settings(parse(["--optim.clip-grad-norm", "3", "--data.order", "quasi_random"]), old)
    state = {"loader": {}, "monitor": {}, "settings": old}
    storage.write(tmp_path / "checkpoints", 1, {"model": {"a": torch.zeros(1)}}, state)
    assert read(tmp_path).settings == settings.as_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    (run,) = read_runs([tmp_path])
    assert run.settings == flat(settings.as_dict())
