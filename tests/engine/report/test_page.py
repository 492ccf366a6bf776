"""The page on runs: its numbers against the files, neighbors against a loop, whatever state a run is in."""

from __future__ import annotations

import html as escaping
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from engine.report import curves, page, tsne
from engine.report.__main__ import main
from engine.report.compare import differences, grouped, rates, table
from engine.report.gallery import Wanted
from engine.report.plotting import DARK, LIGHT, MARKERS, MARKS, Theme, mean_of, sheet
from engine.report.run_folder import Curve, RunFiles, read_runs
from engine.report.sample import SHOWN, agreement, by_chance, nearest, sample
from methods.registry import Terms
from methods.residual import Residual
from pipeline.beton import Beton
from pipeline.system.errors import InputError
from tests.engine.run_folders import EPOCHS, lines, settings, write_checkpoint, write_evaluation, write_lines, write_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are laid out but not rendered, and maps are the first two features, where no test looks at them."""
    if "rendered" not in request.fixturenames:
        dot = BytesIO()
        Image.new("RGB", (1, 1)).save(dot, "PNG")
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, out, **more: out.write(dot.getvalue()))
        monkeypatch.setattr(tsne, "project", lambda found, seed: found[:, :2].numpy())


@pytest.fixture
def rendered() -> None:
    """Asked for by tests that look at pictures."""


def column(runs: list[RunFiles], title: str) -> dict[str, str]:
    """Return a column of the table by row, with a star at the best."""
    titles, rows = table(grouped(runs))
    cells = {row.name: row.cells[titles.index(title)] for row in rows}
    return {name: cell.text + " *" * cell.best for name, cell in cells.items()}


def wanted(data: Path | str = "", limit: int = 100) -> Wanted:
    return Wanted(str(data), 5, limit, 0, "online", CPU)


def text_of(html: str) -> str:
    """Return what a reader sees, in one line."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

    reader = Reader()
    reader.feed(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    return " ".join(" ".join(found).split())


# Numbers


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_evaluation(run, "knn", "kNN, k 200, T 0.07", 0.5123)
    write_evaluation(run, "svm", "linear SVMs", 0.0, map=0.611)
    runs = read_runs([run])
    titles, rows = table(grouped(runs))
    found = dict(zip(titles, rows[0].cells, strict=True))
    last = lines()[-2]
    assert found["method"].text == "moco_v2"
    assert found["loss"].text == f"{last['loss']:.3f}"
    assert found["gap"].text == f"{last['student_teacher_gap']:.4f}"
    assert found["kNN top-1, %"].text == "40.0"
    assert found["kNN, k 200, T 0.07: top-1, %"] == ("51.2", "50.2–52.2", False)
    assert found["linear SVMs: mAP, %"].text == "61.1"
    assert (found["epochs"].text, found["batch"].text, found["device"].text) == ("4", "20", "cpu")


def test_rates_are_over_the_whole_time(tmp_path: Path) -> None:
    seconds = [20 * 5 / (100 * half) for half in range(1, 9)]
    waited = sum(second * 0.01 * half for half, second in enumerate(seconds, start=1))
    found = rates(read_runs([write_run(tmp_path / "a")])[0])
    assert found.pairs_per_second == pytest.approx(40 * 20 / sum(seconds))
    assert found.hours == pytest.approx(sum(seconds) / 3600)
    assert found.data_wait_fraction == pytest.approx(waited / sum(seconds))


def test_seeds_are_summarized_and_the_best_is_sought_among_means(tmp_path: Path) -> None:
    shifts = (0.0, 0.05, 0.02)
    seeds = [write_run(tmp_path / f"s{i}", settings(seed=i), shift=shift) for i, shift in enumerate(shifts)]
    other = write_run(tmp_path / "other", settings(method="simclr"), shift=0.04)
    unfinished = write_run(tmp_path / "more", settings(seed=7), epochs=2, shift=0.3)
    long = settings(method="byol")
    long.optim.epochs = 2 * EPOCHS
    runs = read_runs([*seeds, unfinished, other, write_run(tmp_path / "half", long, shift=0.04)])
    knn = 100 * (0.4 + np.array(shifts))
    mean = f"{knn.mean():.1f} ± {knn.std(ddof=1):.1f}"
    assert column(runs, "kNN top-1, %") == {
        "s0": "40.0", "s1": "45.0", "s2": "42.0", "more": "50.0",
        "mean ± deviation, n = 3": mean, "other": "44.0 *", "half": "44.0",
    }  # fmt: skip
    assert not any(cell.endswith("*") for cell in column(runs, "loss").values())  # of two methods
    assert not any(cell.endswith("*") for cell in column(runs, "minutes").values())
    assert column(runs[:3], "loss") == {
        "s0": "1.000", "s1": "1.050", "s2": "1.020", "mean ± deviation, n = 3": "1.023 ± 0.025"
    }  # fmt: skip


def test_scores_of_other_data_or_protocols_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, settings(method=name)) for name in ("moco_v2", "byol")]
    write_evaluation(runs[0], "knn", "kNN", 0.5)
    write_evaluation(runs[1], "knn", "kNN", 0.6, settings={"encoder": "z", "train": "f1", "test": "f9", "seed": 3})
    for run, lr in zip(runs, (0.3, 3.0), strict=True):  # a rate that was found by a search
        write_evaluation(run, "fast", "linear", 0.7, sweep=[], settings={"lr": lr, "test": "f2"})
    write_evaluation(runs[0], "momentum", "linear", 0.6, settings={"test": "f2"}, which="momentum")
    titles, _ = table(grouped(read_runs(runs)))
    assert [title for title in titles if title.startswith(("kNN:", "linear"))] == [
        "kNN: top-1, %, test test.beton (f2)",
        "kNN: top-1, %, test test.beton (f9)",
        "linear, momentum encoder: top-1, %",
        "linear: top-1, %",
    ]


def test_groups_differ_by_seed_alone_and_differences_are_listed(tmp_path: Path) -> None:
    made = [settings(seed=0), settings(seed=1, log_every=7), settings(seed=2, terms=Terms(residual=Residual()))]
    made[2].optim.lr = 0.5
    runs = read_runs([write_run(tmp_path / str(i), chosen) for i, chosen in enumerate(made)])
    assert [[run.name for run in group.runs] for group in grouped(runs)] == [["0", "1"], ["2"]]
    assert dict(differences(runs)) == {
        "seed": ["0", "1", "2"],
        "terms.residual.weight": ["–", "–", "1.0"],
        "log_every": ["50", "7", "50"],
        "optim.lr": ["0.1", "0.1", "0.5"],
    }


# Curves


def test_a_mean_is_over_the_epochs_that_all_seeds_have() -> None:
    curves = [Curve(np.arange(1.0, n), 2.0 * np.arange(1.0, n) + shift) for n, shift in ((6, 0), (4, 1), (5, 5))]
    found = mean_of(curves)
    assert found.epochs.tolist() == [1, 2, 3]
    assert found.values.tolist() == [4, 6, 8]


def test_long_curves_are_drawn_as_means_over_equal_spans() -> None:
    epochs = np.arange(1, 1001) / 10
    values = np.random.default_rng(0).random(1000)
    (found,) = curves.thinned([Curve(epochs, values)], 20)
    assert found.epochs == pytest.approx(np.arange(20) * 5 + 2.5)
    assert found.values == pytest.approx(values.reshape(20, 50).mean(axis=1))
    assert curves.thinned([Curve(epochs, values)], 500)[0].values is values


def test_charts_are_of_what_runs_have(tmp_path: Path) -> None:
    plain, more = write_run(tmp_path / "a"), write_run(tmp_path / "b", settings(seed=1))
    write_lines(more, [line | {"co2": 0.5, "info_nce": 1.0, "skipped": 2, "substituted": 0} for line in lines()])
    keys = [chart.key for chart in curves.charts(read_runs([plain]))]
    assert keys[:3] == ["loss", "knn_top1", "student_teacher_gap"]  # info_nce is all of the loss
    runs = read_runs([plain, more])
    both = curves.charts(runs)
    assert {"co2", "info_nce", "skipped"} <= {chart.key for chart in both}
    assert "substituted" not in {chart.key for chart in both}
    told = {chart.key: curves.last_values(chart, grouped(runs)) for chart in both}
    assert told["skipped"] == f"skipped steps; last values: b {2 * len(lines())}"
    assert told["alignment"] == "alignment over uniformity; last values: a -4 by 0.25; b -4 by 0.25"


def _contrast(one: str, other: str) -> float:
    """Return the contrast of two colors (WCAG 2.2)."""
    both = []
    for color in (one, other):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        both.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(both) + 0.05) / (min(both) + 0.05)


def test_colors_stand_out_from_their_background() -> None:
    for theme in (LIGHT, DARK):
        assert all(_contrast(color, theme.background) >= 3 for color in theme.colors)
        assert _contrast(theme.ink, theme.background) >= 7
    style = (Path(page.__file__).with_name("page.html")).read_text()
    for theme, colors in zip(
        (LIGHT, DARK), re.findall(r"--muted: (\S+); --tint: (\S+); --right: (\S+);", style), strict=True
    ):
        assert all(_contrast(color, theme.background) >= 4.5 for color in (colors[0], colors[2]))
    assert len(MARKS) == len(MARKERS)


@pytest.mark.usefixtures("rendered")
def test_a_name_is_drawn_as_it_stands() -> None:
    content = sheet([("$\\frac{$", lambda axes: axes.plot([1, 2], label="$_{$"))], LIGHT, (3, 2))
    assert Image.open(BytesIO(content)).size[0] > 300


# Images


@pytest.mark.parametrize("k", [1, 5, 39])
def test_neighbors_are_those_of_a_loop(k: int) -> None:
    found = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(k)), dim=1)
    labels = np.arange(40) % 3
    queries = np.array([7, 0, 39])
    near = nearest(found, queries, k)
    for query, cosines, places in zip(queries, *near, strict=True):
        similar = [(float(found[query] @ found[other]), other) for other in range(40) if other != query]
        expected = sorted(similar, reverse=True)[:k]
        assert [other for _, other in expected] == places.tolist()
        assert [cosine for cosine, _ in expected] == pytest.approx(cosines.tolist(), abs=1e-6)
    right = [labels[other] == labels[q] for q in range(40) for other in nearest(found, np.array([q]), k).places[0]]
    assert agreement(found, labels, k) == pytest.approx(np.mean(right))
    assert by_chance(labels) == pytest.approx(
        np.mean([labels[a] == labels[b] for a in range(40) for b in range(40) if a != b])
    )


def test_copies_of_an_image_do_not_hide_that_it_is_left_out() -> None:
    found = F.normalize(torch.ones(30, 4), dim=1)
    near = nearest(found, np.array([0, 29]), 3)
    assert near.places.shape == (2, 3)
    assert 0 not in near.places[0].tolist()
    assert 29 not in near.places[1].tolist()


def test_a_sample_has_enough_of_each_class_and_the_pictures_are_of_many(drawn: Path) -> None:
    beton = Beton(drawn)
    one, again, other = (sample(beton, 60, 1.0, seed) for seed in (0, 0, 1))
    assert one.ids.tolist() == again.ids.tolist() != other.ids.tolist()
    assert len(set(one.ids.tolist())) == 60
    assert one.labels.tolist() == beton.labels[one.ids].tolist()
    assert np.bincount(one.labels).tolist() == [6] * 10
    assert len(set(one.labels[one.queries].tolist())) == SHOWN
    beton.labels[:] = np.arange(200) // 2  # two images of each of 100 classes
    assert np.unique(sample(beton, 60, 1.0, 0).labels, return_counts=True)[1].tolist() == [2] * 30
    beton.labels[:] = -1
    assert not sample(beton, 60, 1.0, 0).labeled


@pytest.mark.usefixtures("rendered")
def test_maps_show_the_most_frequent_classes_and_keep_neighbors_together(drawn: Path) -> None:
    beton = Beton(drawn)
    beton.labels[:] = np.minimum(np.arange(200) % 40, 20)  # the last of 21 has half of all
    of = sample(beton, 1000, 1.0, 0)
    assert tsne.frequent(of) == [20, *range(14)]
    assert len(tsne.shown(of)) == 100 + 14 * 5
    centers = 10 * torch.eye(4)[torch.arange(80) % 4]
    places = tsne.project(
        F.normalize(centers + torch.randn(80, 4, generator=torch.Generator().manual_seed(0)), dim=1), 0
    )
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(80)
    assert (distances.argmin(axis=1) % 4 == np.arange(80) % 4).all()


@pytest.fixture(scope="module")
def whole(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> page.Report:
    """A page of two runs, rendered, with few charts."""
    runs = [tmp_path_factory.mktemp("runs") / name for name in ("a", "b" * 100)]
    for seed, run in enumerate(runs):
        write_run(run, settings(drawn, seed=seed))
        write_checkpoint(run, settings(drawn), seed=seed)
        kept = ("step", "epoch", "loss", "knn_top1", "alignment", "uniformity")
        write_lines(run, [{key: line[key] for key in kept if key in line} for line in lines()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tsne, "project", lambda found, seed: found[:, :2].numpy())
        return page.report(read_runs(runs), wanted())


def test_the_page_shows_images_and_their_neighbors(whole: page.Report) -> None:
    assert sorted(whole.pictures) == ["curves", "map"]
    for content in whole.pictures.values():
        assert min(Image.open(BytesIO(content)).size) > 500
    assert "100 of its 200 images, of 10 classes" in text_of(whole.html)
    assert whole.html.count('<div class="query') == SHOWN
    assert whole.html.count('<figure class="right">') + whole.html.count('<figure class="wrong">') == 2 * SHOWN * 5
    names = re.findall(r'alt="image of class (\w+)"', whole.html)
    assert len(set(names)) == SHOWN
    first = whole.html.split('<div class="query')[1]
    for kind, name in re.findall(r'<figure class="(right|wrong)">\s*<img[^>]* alt="(\w+)"', first):
        assert (kind == "right") == (name == names[0])


def test_data_may_be_given_and_need_no_labels(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save(images / f"{number}.jpg")
    from pipeline.prepare import prepare

    prepare(str(images), tmp_path / "flat.beton", workers=1, quiet=True)
    run = write_run(tmp_path / "a")
    write_checkpoint(run, settings())
    made = page.report(read_runs([run]), wanted(tmp_path / "flat.beton"))
    assert made.html.count('<div class="query') == SHOWN
    assert "own class" not in made.html
    assert "<figure class=" not in made.html
    with pytest.raises(InputError, match=r"nowhere\.beton"):
        page.report(read_runs([run]), wanted(tmp_path / "nowhere.beton"))


def test_damaged_images_are_left_out_for_all(drawn: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.beton"
    content = bytearray(drawn.read_bytes())
    beton = Beton(drawn)
    for index in (3, 77):
        start = int(beton.pointers[index])
        content[start + 100 : start + 140] = bytes(40)
    copy.write_bytes(content)
    Path(f"{copy}.json").write_bytes(Path(f"{drawn}.json").read_bytes())
    run = write_run(tmp_path / "a", settings(copy))
    write_checkpoint(run, settings(copy))
    text = text_of(page.report(read_runs([run]), wanted(limit=200)).html)
    assert "198 of its 200 images" in text


# Whatever state a run is in


def test_nothing_from_a_run_becomes_markup(drawn: Path, tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}$\\frac{'
    run = write_run(tmp_path / "<b>$\\frac{", settings(drawn))
    write_checkpoint(run, settings(drawn))
    beton = tmp_path / "evil.beton"
    beton.write_bytes(drawn.read_bytes())
    manifest = json.loads(Path(f"{drawn}.json").read_text())
    manifest["classes"] = [f"{evil}{i}" for i in range(10)]
    Path(f"{beton}.json").write_text(json.dumps(manifest))
    recipe = (run / "config.yaml").read_text().replace("name: moco_v2", f"name: {json.dumps(evil)}")
    (run / "config.yaml").write_text(f"{recipe}extra: {json.dumps(evil)}\n")
    write_lines(run, [line | {evil: 1.0, "gradient_share_" + evil: 0.5} for line in lines()])
    (run / "summary.json").write_text(json.dumps({"device": evil, "processes": evil}))
    write_evaluation(run, "x", evil, 0.5, which=evil, interval=[evil, None], checkpoint=evil, test=evil)
    write_evaluation(run, "y", evil, 0.5, settings=evil, map=evil, interval=evil)
    other = write_run(tmp_path / "other", settings(seed=1))
    made = page.report(read_runs([run, other]), wanted(beton))
    assert escaping.escape(evil, quote=False).replace('"', "&#34;") in made.html
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attributes)))

    Reader().feed(made.html)
    assert not {tag for tag, _ in tags} & {"script", "b", "iframe", "link", "object"}
    assert not any(key.startswith("on") or key == "href" for _, attributes in tags for key in attributes)
    assert all((found.get("src") or "data:image/").startswith("data:image/") for _, found in tags)
    assert "7 * 7" in made.html


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"step": 1, "epoch": 0.5, "loss": 3}\n{"step": 2, "ep', "is cut off"),
        ('junk\n[1]\n{"epoch": "x", "step": 1}\n{"step": 1, "epoch": 0.5, "loss": 3}\n', "3 lines of metrics.jsonl"),
        ('{"step": 1, "epoch": 0.5, "loss": NaN}\n', "Training has not ended"),
        ('{"step": 1, "epoch": 0.5, "loss": 3}\njunk\n', "1 lines of metrics.jsonl"),
        ("", "is empty"),
        ("[" * 100_000, "is cut off"),
        (None, "There is no metrics.jsonl"),
    ],
)
def test_metrics_in_part_give_a_page_in_part(content: str | None, says: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    made = page.report(read_runs([run, write_run(tmp_path / "b", settings(seed=1))]), None)
    assert says in text_of(made.html)
    assert "curves" in made.pictures


def test_only_finite_numbers_are_taken_from_metrics(tmp_path: Path) -> None:
    line = '{"step": 1, "epoch": 0.5, "a": NaN, "b": -Infinity, "c": true, "d": "1", "e": [1], "f": 1%s, "loss": 3}'
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text(line % ("0" * 400) + "\n")
    assert read_runs([run])[0].lines == [{"step": 1.0, "epoch": 0.5, "loss": 3.0}]


@pytest.mark.parametrize(
    "recipe",
    [
        "a: [",
        "- 1",
        "3: {4: 5}",
        "a: &a [1]\nb: *a",
        "!!python/object/apply:os.system [true]",
        "x: " + "[" * 5000,
        None,
    ],
)
def test_settings_that_cannot_be_read_are_told(recipe: str | None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "config.yaml").unlink()
    if recipe is not None:
        (run / "config.yaml").write_text(recipe)
    text = text_of(page.report(read_runs([run]), wanted()).html)
    assert "config.yaml cannot be read" in text or "There is no config.yaml" in text
    assert "1.000" in text  # its loss


def test_without_a_whole_checkpoint_there_are_no_images_but_all_else(drawn: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", settings(drawn), epochs=2.5)
    text = text_of(page.report(read_runs([run]), wanted()).html)
    assert "there is no whole checkpoint yet" in text
    assert "it was at epoch 2.50 of 4" in text
    broken = write_checkpoint(run, settings(drawn)) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    text = text_of(page.report(read_runs([run]), wanted()).html)
    assert "damaged" in text
    write_checkpoint(run, settings(drawn), step=10)
    made = page.report(read_runs([run]), wanted())
    assert "passed over" in text_of(made.html)
    assert "step_00000010" in text_of(made.html)


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "/dev/zero", "[]", "**", "gone/{1..2}.tar"])
def test_data_of_impossible_names_are_told(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", settings(name))
    write_checkpoint(run, settings())
    assert "Its encoder is not looked at" in text_of(page.report(read_runs([run]), wanted()).html)


@pytest.mark.usefixtures("rendered")
def test_numbers_beyond_reason_are_drawn_all_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    kept = ("step", "epoch", "loss", "alignment", "uniformity", "skipped")
    wild = [{key: value * 1e308 for key, value in zip(kept, (1, 1, -1, 1, -1, 1), strict=True)}]
    write_lines(run, [{key: line[key] for key in kept if key in line} for line in lines()] + wild)
    assert "curves" in page.report(read_runs([run]), None).pictures


def test_missing_data_and_collapse_are_told(drawn: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", settings("gone.beton"))
    write_checkpoint(run, settings())
    assert "gone.beton: no such file" in text_of(page.report(read_runs([run]), wanted()).html)
    state = resnet_of_zeros(run)
    text = text_of(page.report(read_runs([state]), wanted(drawn)).html)
    assert "it is collapsed" in text


def resnet_of_zeros(run: Path) -> Path:
    """Write a checkpoint all of whose weights are 0, so that all features are equal."""
    from engine.checkpoint import storage

    path, _ = storage.newest(run / "checkpoints")
    assert path is not None
    tensors, _ = storage.load(path)
    model = {name: torch.zeros_like(value) for name, value in tensors["model"].items()}
    rest = {"loader": {}, "monitor": {}, "settings": settings().as_dict()}
    storage.write(run / "checkpoints", EPOCHS * 100, {"model": model}, rest)
    return run


def test_data_are_found_from_where_training_was_started(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "own.beton").write_bytes(drawn.read_bytes())
    run = write_run(tmp_path / "runs" / "a")
    chosen = settings("own.beton")
    chosen.out = "runs/a"
    chosen.write(run / "config.yaml")
    write_checkpoint(run, chosen)
    assert "Images of own.beton" in text_of(page.report(read_runs([run]), wanted()).html)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos: is no run"):
        read_runs([tmp_path / "photos"])
    with pytest.raises(InputError, match="no such folder"):
        read_runs([tmp_path / "nothing"])


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("x/run", "y/run")]
    assert [run.name for run in read_runs([*paths, paths[0] / "..", paths[0]][:2] + [paths[0]])] == ["x/run", "y/run"]


# The command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_page_and_its_pictures_are_written_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a")
    assert command(monkeypatch, str(run), "--no-pictures") == 0
    assert {path.name for path in run.iterdir()} >= {"report.html", "report-curves.png"}
    assert not list(run.glob(".*"))
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, str(run), str(write_run(tmp_path / "b", settings(seed=1))), "--no-pictures") == 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--out", "x.txt"], "ends in .html"),
        (["--out", "no/x.html"], "cannot be written"),
        (["--neighbors", "0"], "choose 1 to 100"),
        (["--limit", "3"], "choose 10"),
        (["--seed", "-1"], "0 or more"),
    ],
)
def test_impossible_options_are_one_line_and_exit_status_2(
    more: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, str(run), "--no-pictures", *more) == 2
    assert says in capsys.readouterr().err


# In a browser

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_MEASURE = """
<iframe id="page" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
const page = document.getElementById("page");
page.onload = () => {{
  const inside = page.contentDocument, images = [...inside.images];
  document.body.dataset.found = JSON.stringify({{
    width: inside.documentElement.scrollWidth,
    background: page.contentWindow.getComputedStyle(inside.body).backgroundColor,
    shown: images.filter(image => image.naturalWidth > 0).length,
    images: images.length,
    sources: images.map(image => image.currentSrc.slice(-60)),
  }});
}};
page.srcdoc = {html};
</script>
"""


@pytest.mark.skipif(_BROWSER is None, reason="needs chromium or google-chrome on PATH")
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_shows_it_whole(width: int, theme: Theme, whole: page.Report, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(_MEASURE.format(width=width, html=json.dumps(whole.html).replace("</", "<\\/")))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--window-size=1600,1000"]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={int(theme is LIGHT)}",
    ]
    assert _BROWSER is not None
    done = subprocess.run(
        [_BROWSER, *options, "--dump-dom", f"file://{frame}"], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(escaping.unescape(re.findall(r'data-found="([^"]*)"', done.stdout)[0]))
    assert found["width"] <= width
    assert found["background"] == "rgb({}, {}, {})".format(*(int(theme.background[i : i + 2], 16) for i in (1, 3, 5)))
    assert found["shown"] == found["images"] > 20
    attribute = "srcset" if theme is DARK else "src"
    chosen = re.findall(rf' {attribute}="data:image/png[^"]*([^"]{{60}})"', whole.html)
    assert set(chosen) <= set(found["sources"])
    assert len(chosen) >= 5
