"""Settings made in Python are validated as those of recipes are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest

from engine.config.settings import Data, Knn, Method, Model, Optim, Settings
from methods.co2 import CO2
from methods.registry import Terms
from pipeline.system.errors import InputError


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Data(size=4), "data.size 4: choose 8 to 1024 pixels"),
        (lambda: Data(sizes=[4, 224]), "data.sizes [4, 224]: give sides of 8 to 1024 pixels"),
        (lambda: Data(augmentation="swav"), "data.augmentation 'swav': choose one of two views: moco_v1"),
        (lambda: Data(views=[{}]), "data.views: 1 view, and every method takes two"),
        (lambda: Data(views=[{}, {"gray": 1}]), "data.views {gray: 1}: no such key, did you mean gray_p"),
        (lambda: Data(mean="auto", std=[1.0]), "data.std [1.0]: give three numbers above 0, up to 1, or auto"),
        (lambda: Data(bach=3), "data.bach: no such setting, did you mean data.batch"),  # type: ignore[call-arg]
        (lambda: Model(dim=1), "model.dim 1: choose 2 to 65536, or null"),
        (lambda: Method(name="moco"), "method.name 'moco': choose one of 'moco_v1'"),  # type: ignore[arg-type]
        (lambda: Optim(lr=float("nan")), "optim.lr nan: give a finite number"),
        (lambda: Optim(lr="x"), "optim.lr 'x': wrong type: give a number"),  # type: ignore[arg-type]
        (lambda: Knn(k=0), "knn.k 0: choose 1 to 65536"),
        (lambda: Settings(seed=-1), "seed -1: choose 0 to 4294967295"),
        (lambda: Settings(micro_batch=1), "micro_batch 1: choose 2 or more, or 0"),
        (lambda: Settings(terms=Terms(co2=CO2(weight=-1))), "terms.co2.weight -1: choose a number above 0"),
        (lambda: replace(Settings(), log_every=0), "log_every 0: choose 1 or more steps"),
        (lambda: Settings(allow_change=["optim.clip"]), "allow_change: optim.clip: renamed to optim.clip_grad_norm"),
    ],
)
def test_wrong_values_are_refused(made: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError) as refused:
        made()
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_settings_are_plain_dataclasses() -> None:
    settings = Settings(Data("x.beton"), Model("resnet18"), optim=Optim(lr=1), cpu=True)
    assert (settings.data.train, settings.model.arch, settings.optim.lr) == ("x.beton", "resnet18", 1.0)
    changed = replace(settings, data=replace(settings.data, batch=64))
    assert (changed.data.batch, settings.data.batch, changed.cpu) == (64, 256, True)
    assert asdict(changed) == changed.as_dict()
    assert pickle.loads(pickle.dumps(changed)) == changed
