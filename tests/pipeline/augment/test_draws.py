"""Tests of the augmentation's draws: pure, independent of the batch, distributed like torchvision's transforms.

Statistics are of fixed seeds, so that they hold always or never; their limits are exceeded by true draws once in
10,000 times or less.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.augment.draws import TRIES, Color, ViewDraws, center_boxes, crop_boxes, draw_view
from pipeline.views import AUGMENTATIONS, View

N = 100_000
_SHAPES = [(1, 1), (1, 500), (500, 2), (32, 32), (375, 500), (500, 375), (3, 7)]
_VIEW = View(
    hflip=0.3,
    vflip=0.2,
    jitter_p=0.6,
    gray_p=0.1,
    blur_p=0.7,
    solarize_p=0.45,
    brightness=0.8,
    contrast=0.4,
    saturation=0.2,
)

Floats = npt.NDArray[np.float64]


def _draw(
    ids: np.ndarray | list[int],
    view: View = _VIEW,
    index: int = 0,
    *,
    seed: int = 7,
    epoch: int = 3,
    shape: tuple[int, int] = (375, 500),
) -> ViewDraws:
    ids = np.asarray(ids, np.int64)
    heights, widths = (np.full(len(ids), side, np.int32) for side in shape)
    return draw_view(view, index, seed=seed, epoch=epoch, ids=ids, heights=heights, widths=widths)


@pytest.fixture(scope="module")
def many() -> ViewDraws:
    """Return the draws of N samples."""
    return _draw(np.arange(N))


def _arrays(draws: ViewDraws) -> dict[str, np.ndarray]:
    color = {f.name: getattr(draws.color, f.name) for f in fields(Color) if f.name not in ("gray_first", "threshold")}
    return {"boxes": draws.boxes, "flips": draws.flips, "vflips": draws.vflips, **color}


def _same(a: ViewDraws, b: ViewDraws) -> bool:
    left, right = _arrays(a), _arrays(b)
    return all(np.array_equal(left[name], right[name]) for name in left)


def _distance_from_uniform(values: np.ndarray, low: float, high: float) -> float:
    """Return the Kolmogorov-Smirnov statistic times the root of the sample size; above 2.23 once in 10,000 times."""
    cdf = (np.sort(values.astype(np.float64)) - low) / (high - low)
    n = len(cdf)
    steps = np.arange(n + 1) / n
    return float(max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())) * math.sqrt(n)


def _distance_between(a: Floats, b: Floats) -> float:
    """Return the two-sample Kolmogorov-Smirnov statistic, scaled in the same way."""
    a, b, at = np.sort(a), np.sort(b), np.concatenate([a, b])
    gap = np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
    return float(np.abs(gap).max()) * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


# ---- purity ----


def test_draws_do_not_depend_on_the_rest_of_the_batch() -> None:
    ids = np.array([5, 0, 1281166, 77, 12, 3, 2**40])
    together = _arrays(_draw(ids))
    for order in (ids[::-1], np.roll(ids, 3), ids[2:5], ids[:1], np.concatenate([ids, np.arange(100, 300)])):
        part = _arrays(_draw(order))
        for name, values in part.items():
            for row, sample in enumerate(order):
                if sample in ids:
                    in_batch = together[name][int(np.flatnonzero(ids == sample)[0])]
                    assert np.array_equal(values[row], in_batch), name


def test_an_image_size_changes_only_its_sample_s_boxes() -> None:
    heights = np.full(6, 375)
    other = np.where(np.arange(6) == 4, 60, heights)
    ids, widths = np.arange(6), np.full(6, 500)
    a, b = (
        draw_view(_VIEW, 0, seed=1, epoch=1, ids=ids, heights=high, widths=widths).boxes for high in (heights, other)
    )
    assert (a != b).any(axis=1).tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 4}, {"index": 1}, {"ids": 100}])
def test_another_seed_epoch_id_or_view_gives_other_draws(change: dict[str, int]) -> None:
    ids = np.arange(50) + change.pop("ids", 0)
    before, after = _arrays(_draw(np.arange(50))), _arrays(_draw(ids, **change))  # type: ignore[arg-type]
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        assert not (before[name] == after[name]).any()
    assert (before["boxes"] == after["boxes"]).all(axis=1).sum() <= 1  # the full image may occur twice
    for name in ("flips", "vflips", "jitter", "gray", "blur", "solarize", "order"):
        assert not np.array_equal(before[name], after[name])


def test_seed_epoch_id_and_view_are_not_exchangeable() -> None:
    assert not _same(_draw([0], seed=1, epoch=2), _draw([0], seed=2, epoch=1))
    assert not _same(_draw([1], epoch=2), _draw([2], epoch=1))
    assert not _same(_draw([1], index=0), _draw([0], index=1))


def test_draws_never_change() -> None:
    """A change means that no earlier run can be resumed or repeated."""
    draws = _draw([0, 1, 2, 1281166], AUGMENTATIONS["moco_v2"][0])
    color = draws.color
    assert draws.boxes.tolist() == [[52, 62, 262, 210], [13, 109, 281, 263], [0, 22, 371, 466], [33, 40, 315, 386]]
    assert draws.flips.tolist() == [False, True, False, False]
    assert not draws.vflips.any()
    assert color.jitter.tolist() == [True, True, True, False]
    assert color.order.tolist() == [[3, 0, 2, 1], [2, 1, 3, 0], [3, 1, 2, 0], [3, 1, 0, 2]]
    assert color.blur.tolist() == [False, True, False, True]
    assert not color.gray.any()
    assert not color.solarize.any()
    for name, expected in {
        "brightness": [1.110457, 1.220045, 1.267943, 1.364785],
        "contrast": [0.8702056, 1.043517, 1.210065, 1.323405],
        "saturation": [0.804805, 1.116769, 1.239984, 0.8205473],
        "hue": [-0.08667979, -0.0334649, 0.005975596, -0.09805781],
        "sigma": [1.150473, 0.8773643, 0.3772389, 0.5551665],
    }.items():
        np.testing.assert_allclose(getattr(color, name), expected, rtol=1e-6, err_msg=name)
    second = _draw(np.arange(30), AUGMENTATIONS["moco_v3"][1], 1)
    assert second.boxes[9].tolist() == [26, 20, 258, 339]
    assert np.flatnonzero(second.color.gray).tolist() == [3, 7, 9, 20, 22, 23, 24, 28]
    assert np.flatnonzero(second.color.solarize).tolist() == [9, 14, 17, 18, 19, 22, 24]
    assert np.flatnonzero(second.color.blur).tolist() == [16]


@pytest.mark.parametrize(
    ("setting", "moved"),
    [
        ({"hflip": 0.9}, {"flips"}),
        ({"vflip": 0.9}, {"vflips"}),
        ({"jitter_p": 0.1}, {"jitter"}),
        ({"brightness": 0.1}, {"brightness"}),
        ({"contrast": 0.1}, {"contrast"}),
        ({"saturation": 0.1}, {"saturation"}),
        ({"hue": 0.4}, {"hue"}),
        ({"gray_p": 0.9}, {"gray"}),
        ({"blur_p": 0.1}, {"blur"}),
        ({"blur_sigma": (1.0, 1.5)}, {"sigma"}),
        ({"solarize_p": 0.9}, {"solarize"}),
        ({"crop_scale": (0.5, 0.6)}, {"boxes"}),
        ({"crop_ratio": (0.9, 1.0)}, {"boxes"}),
    ],
)
def test_a_setting_changes_only_its_draw(setting: dict[str, float], moved: set[str]) -> None:
    before, after = _arrays(_draw(np.arange(200))), _arrays(_draw(np.arange(200), replace(_VIEW, **setting)))  # type: ignore[arg-type]
    assert {name for name in before if not np.array_equal(before[name], after[name])} == moved


def test_draws_have_the_documented_types(many: ViewDraws) -> None:
    kinds = {name: (values.dtype, values.shape) for name, values in _arrays(many).items()}
    for name in ("flips", "vflips", "jitter", "gray", "blur", "solarize"):
        assert kinds[name] == (np.bool_, (N,))
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        assert kinds[name] == (np.float32, (N,))
    assert kinds["boxes"] == (np.int32, (N, 4))
    assert kinds["order"] == (np.int64, (N, 4))


# ---- distributions ----


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.2, 1.8),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ],
)
def test_factors_are_uniform_in_their_range(many: ViewDraws, name: str, low: float, high: float) -> None:
    values = getattr(many.color, name)
    assert low - 1e-6 <= values.min() < values.max() <= high + 1e-6
    assert _distance_from_uniform(values, low, high) < 2.23


@pytest.mark.parametrize("number", range(4))
def test_an_operation_of_strength_zero_is_skipped(number: int) -> None:
    """As in torchvision's ColorJitter, whose other operations keep their order."""
    names = ("brightness", "contrast", "saturation", "hue")
    before, after = (_draw(np.arange(300), view).color.order for view in (_VIEW, replace(_VIEW, **{names[number]: 0})))
    assert np.array_equal(after, np.where(before == number, 4, before))


def test_factors_are_never_negative() -> None:
    color = _draw(np.arange(1000), replace(_VIEW, brightness=1.5, contrast=1.5, saturation=1.5)).color
    for values in (color.brightness, color.contrast, color.saturation):
        assert values.min() >= 0.0
        assert _distance_from_uniform(values, 0.0, 2.5) < 2.23


@pytest.mark.parametrize(
    ("name", "share"),
    [("flips", 0.3), ("vflips", 0.2), ("jitter", 0.6), ("gray", 0.1), ("blur", 0.7), ("solarize", 0.45)],
)
def test_operations_have_their_probability(many: ViewDraws, name: str, share: float) -> None:
    chosen = _arrays(many)[name].mean()
    assert abs(chosen - share) < 4 * math.sqrt(share * (1 - share) / N)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_probabilities_of_zero_and_one_are_exact(share: float) -> None:
    view = View(hflip=share, vflip=share, jitter_p=share, gray_p=share, blur_p=share, solarize_p=share)
    for name, values in _arrays(_draw(np.arange(5000), view)).items():
        if values.dtype == np.bool_:
            assert set(values.tolist()) == {bool(share)}, name


def test_all_24_orders_of_operations_are_equally_likely(many: ViewDraws) -> None:
    counts = Counter(map(tuple, many.color.order.tolist()))
    assert all(sorted(order) == [0, 1, 2, 3] for order in counts)
    assert len(counts) == 24
    expected = N / 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 55.6  # 23 degrees of freedom


def test_accepted_boxes_have_uniform_area_and_log_aspect() -> None:
    """The image is so large that rounding is negligible, and areas fit at the first try for every aspect."""
    view = replace(_VIEW, crop_scale=(0.2, 0.74))
    top, left, height, width = _draw(np.arange(N), view, shape=(40_000, 40_000)).boxes.T.astype(np.float64)
    assert _distance_from_uniform(height * width / 40_000**2, 0.2, 0.74) < 2.23
    assert _distance_from_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3)) < 2.23
    assert _distance_from_uniform(top / (40_001 - height), 0, 1) < 2.23
    assert _distance_from_uniform(left / (40_001 - width), 0, 1) < 2.23


def test_draws_of_one_sample_are_uncorrelated(many: ViewDraws) -> None:
    values = [np.asarray(v, np.float64) for v in _arrays(many).values() if v.ndim == 1]
    rows = np.stack([*values, *many.color.order[:, :1].T, *many.boxes[:, :2].T])
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    correlations[-2:, -2:] = 0  # top and left both depend on the box's size
    assert np.abs(correlations).max() < 4.2 / math.sqrt(N)


def test_other_keys_give_uncorrelated_draws() -> None:
    n = 5000
    ids = np.arange(n)
    near = [
        _draw(ids, seed=seed, epoch=epoch, index=index)
        for seed, epoch, index in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 1, 0), (0, 2, 0))
    ] + [_draw(ids + 1, seed=0, epoch=0), _draw(ids * 2**20, seed=0, epoch=0)]
    for name in ("brightness", "hue", "sigma", "boxes"):
        rows = np.stack([_arrays(d)[name].reshape(n, -1)[:, -1].astype(np.float64) for d in near])
        assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 4.5 / math.sqrt(n), name


# ---- boxes ----


def _get_params(
    uniforms: list[list[float]], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[tuple[int, int, int, int], bool]:
    """Return torchvision.transforms.RandomResizedCrop.get_params for given random numbers, and whether it fell back."""
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_aspect, u_top, u_left in uniforms:
        target_area = area * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect_ratio = math.exp(low + u_aspect * (high - low))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return (int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w), False
    in_ratio = float(width) / float(height)
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w, h = width, height
    return ((height - h) // 2, (width - w) // 2, h, w), True


@pytest.mark.parametrize(("height", "width"), _SHAPES)
@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 1.1))])
def test_boxes_equal_torchvision_s_and_are_inside_the_image(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    n = 400
    u = np.random.default_rng(height * width).random((n, TRIES, 4))
    boxes = crop_boxes(u, np.full(n, height, np.int32), np.full(n, width, np.int32), scale, ratio)
    assert boxes.dtype == np.int32
    assert boxes.tolist() == [list(_get_params(tries, height, width, scale, ratio)[0]) for tries in u.tolist()]
    top, left, high, wide = boxes.T
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] >= 0).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()


def test_boxes_of_mixed_sizes_equal_those_of_each_size() -> None:
    u = np.random.default_rng(1).random((len(_SHAPES), TRIES, 4))
    heights, widths = (np.array(sides, np.int32) for sides in zip(*_SHAPES, strict=True))
    together = crop_boxes(u, heights, widths, (0.2, 1.0), (3 / 4, 4 / 3))
    for i, box in enumerate(together.tolist()):
        alone = crop_boxes(u[i : i + 1], heights[i : i + 1], widths[i : i + 1], (0.2, 1.0), (3 / 4, 4 / 3))
        assert alone.tolist() == [box]


@pytest.mark.parametrize(
    ("shape", "centered"),
    [
        ((20, 500), [0, 236, 20, 27]),
        ((500, 20), [236, 0, 27, 20]),
        ((1, 500), [0, 249, 1, 1]),
    ],
)
def test_extreme_shapes_fall_back_to_the_center(shape: tuple[int, int], centered: list[int]) -> None:
    u = np.random.default_rng(0).random((200, TRIES, 4))
    height, width = (np.full(200, side, np.int32) for side in shape)
    boxes = crop_boxes(u, height, width, (0.2, 1.0), (3 / 4, 4 / 3))
    assert all(_get_params(tries, *shape, (0.2, 1.0), (3 / 4, 4 / 3))[1] for tries in u.tolist())
    assert boxes.tolist() == [centered] * 200


def test_a_late_try_is_taken_before_the_fallback() -> None:
    u = np.full((1, TRIES, 4), 0.999)  # too wide for the image, except at the last try
    u[0, -1] = 0.0, 0.5, 0.0, 0.0
    box = crop_boxes(u, np.array([100]), np.array([100]), (0.2, 1.0), (3 / 4, 4 / 3))
    assert box.tolist() == [[0, 0, 45, 45]]


def test_the_full_image_is_the_fallback_within_the_ratio() -> None:
    u = np.full((1, TRIES, 4), 0.999)
    box = crop_boxes(u, np.array([100]), np.array([110]), (0.2, 1.0), (3 / 4, 4 / 3))
    assert box.tolist() == [[0, 0, 100, 110]]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (60, 200)])
def test_boxes_have_torchvision_s_distribution(height: int, width: int) -> None:
    """The reference is a transcription with NumPy's generator, including rejected tries and fallbacks."""
    boxes = _draw(np.arange(N), shape=(height, width)).boxes.astype(np.float64)
    rng = np.random.default_rng(5)
    reference = np.array(
        [_get_params(t, height, width, (0.2, 1.0), (3 / 4, 4 / 3))[0] for t in rng.random((N // 2, TRIES, 4)).tolist()],
        np.float64,
    )
    for column in range(4):
        assert _distance_between(boxes[:, column], reference[:, column]) < 2.23
    assert _distance_between(boxes[:, 2] * boxes[:, 3], reference[:, 2] * reference[:, 3]) < 2.23


@pytest.mark.parametrize("share", [1.0, 0.875, 0.01])
def test_center_boxes_are_centered_squares_inside_the_image(share: float) -> None:
    heights, widths = (np.array(sides, np.int32) for sides in zip(*_SHAPES, strict=True))
    boxes = center_boxes(heights, widths, share)
    top, left, high, wide = boxes.T
    assert boxes.dtype == np.int32
    assert (high == wide).all()
    assert high.tolist() == [max(1, round(min(shape) * share)) for shape in _SHAPES]
    assert (np.abs(2 * top + high - heights) <= 1).all()
    assert (np.abs(2 * left + wide - widths) <= 1).all()
