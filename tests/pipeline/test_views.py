"""Tests of the published augmentations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.views import AUGMENTATIONS, VIEW_KEYS, View, ViewError, changed_views, view_sizes


def test_augmentations_are_as_published() -> None:
    def settings(view: View) -> tuple[object, ...]:
        jitter = (view.brightness, view.contrast, view.saturation, view.hue)
        return view.crop_scale, view.jitter_p, jitter, view.gray_p, view.blur_p, view.solarize_p, view.gray_first

    v2 = ((0.2, 1.0), 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0, False)
    published = {
        "moco_v1": [((0.2, 1.0), 1.0, (0.4, 0.4, 0.4, 0.4), 0.2, 0.0, 0.0, True)] * 2,
        "moco_v2": [v2] * 2,
        "moco_v3": [
            ((0.2, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0, False),
            ((0.2, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2, False),
        ],
        "simclr": [((0.08, 1.0), 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0.0, False)] * 2,
        "byol": [
            ((0.08, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0, False),
            ((0.08, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2, False),
        ],
        "swav": [((0.14, 1.0), 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0.0, False)] * 2
        + [((0.05, 0.14), 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0.0, False)] * 6,
    }
    assert view_sizes(AUGMENTATIONS["swav"], 224) == (224, 224, *[96] * 6)
    assert {name for name in AUGMENTATIONS if not name.endswith("_32")} == set(published)
    for name, views in published.items():
        assert [settings(view) for view in AUGMENTATIONS[name]] == views
        for view in AUGMENTATIONS[name]:
            assert (view.vflip, view.solarize_threshold) == (0.0, 128)
            assert (view.hflip, view.crop_ratio, view.blur_sigma) == (0.5, (3 / 4, 4 / 3), (0.1, 2.0))
        if name == "swav":
            continue
        assert AUGMENTATIONS[f"{name}_32"] == tuple(replace(view, blur_p=0.0) for view in AUGMENTATIONS[name])


def test_a_changed_view_is_the_presets_at_its_place() -> None:
    first, second = AUGMENTATIONS["moco_v3"]
    assert changed_views([{}, {}], "moco_v3") == (first, second)
    assert changed_views([{"hue": 0}, {"preset": "simclr"}], "moco_v3") == (
        replace(first, hue=0.0),
        AUGMENTATIONS["simclr"][1],
    )
    assert changed_views([], "moco_v3") == ()
    assert changed_views([{"preset": None, "hue": None}], "moco_v1") == AUGMENTATIONS["moco_v1"][:1]


def test_every_key_changes_its_field_alone() -> None:
    given: dict[str, Any] = {"crop_scale": [0.5, 1], "crop_ratio": [1, 2], "blur_sigma": [0.5, "1e-0"]}
    given |= {"hflip": 0, "vflip": 1, "brightness": 0, "contrast": 1, "saturation": 2, "hue": 0.25, "jitter_p": 1}
    given |= {"gray_p": 1, "blur_p": 0, "solarize_p": 0.5, "solarize_threshold": 100.0}
    assert {"preset", *given} == set(VIEW_KEYS)
    (base,) = AUGMENTATIONS["moco_v2"][:1]
    for key, value in given.items():
        expected = tuple(map(float, value)) if isinstance(value, list) else value
        (view,) = changed_views([{key: value}], "moco_v2")
        assert view == replace(base, **{key: expected})
        assert type(getattr(view, key)) is type(getattr(base, key))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"hu": 1}, "{hu: 1}: no such key, did you mean hue: choose of preset, crop_scale"),
        ({"scale": [0, 1]}, "did you mean crop_scale"),
        ({"preset": "moco"}, "{preset: moco}: choose one of moco_v1"),
        ({"preset": 3}, "{preset: 3}: choose one of moco_v1"),
        ({"x" * 300: 1}, "{" + "x" * 199 + ": no such key"),
        ({"preset": []}, "{preset: []}: choose one of moco_v1"),
        ({"hue": 0.6}, "{hue: 0.6}: choose a number from 0 to 0.5"),
        ({"hue": -0.1}, "{hue: -0.1}: choose a number from 0 to 0.5"),
        ({"hue": True}, "{hue: True}: choose a number"),
        ({"hue": "x"}, "{hue: x}: choose a number"),
        ({"hue": float("nan")}, "{hue: nan}: choose a number"),
        ({"hue": [0.1]}, "choose a number"),
        ({"brightness": 11}, "choose a number from 0 to 10"),
        ({"vflip": 1.5}, "choose a number from 0 to 1"),
        ({"solarize_threshold": 0.5}, "choose a whole number from 0 to 256"),
        ({"solarize_threshold": 10**400}, "choose a whole number from 0 to 256"),
        ({"crop_scale": 0.5}, "choose two numbers, the smaller first, from 0.001 to 1"),
        ({"crop_scale": [0.5]}, "choose two numbers"),
        ({"crop_scale": [1, 0.5]}, "choose two numbers"),
        ({"crop_scale": [0, 1]}, "choose two numbers"),
        ({"crop_scale": [0.5, True]}, "choose two numbers"),
        ({"crop_scale": [[0.5], 1]}, "choose two numbers"),
        ({"crop_scale": {"a": 1}}, "choose two numbers"),
        ({"blur_sigma": [0.1, 3]}, "choose two numbers, the smaller first, from 0.01 to 2"),
    ],
)
def test_a_wrong_view_is_refused(view: dict[str, Any], message: str) -> None:
    with pytest.raises(ViewError) as refused:
        changed_views([{}, view], "moco_v2")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
