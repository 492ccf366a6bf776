"""Tests of the published augmentations."""

from __future__ import annotations

from dataclasses import replace

from pipeline.views import AUGMENTATIONS, View, view_sizes


def test_augmentations_are_as_published() -> None:
    def settings(view: View) -> tuple[object, ...]:
        jitter = (view.brightness, view.contrast, view.saturation, view.hue)
        return view.scale, view.jitter, jitter, view.gray, view.blur, view.solarize, view.gray_first

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
            assert (view.flip, view.ratio, view.sigma) == (0.5, (3 / 4, 4 / 3), (0.1, 2.0))
        if name == "swav":
            continue
        assert AUGMENTATIONS[f"{name}_32"] == tuple(replace(view, blur=0.0) for view in AUGMENTATIONS[name])
