"""The page: images and neighbors, untrusted text, and its look in a browser."""

from __future__ import annotations

import html as escaping
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.report import page
from engine.report.plotting import DARK, LIGHT, Theme
from engine.report.run_folder import read_runs
from engine.report.sample import QUERIES, agreement, draw_sample, embed
from engine.weights.load import load_encoder
from methods.encoders import resnet
from pipeline.beton import Beton
from tests.engine.report.conftest import options, text_of
from tests.engine.run_folders import lines, settings, write_checkpoint, write_evaluation, write_lines, write_run
from tests.side_files import copy_side_files


def test_the_page_shows_images_and_their_neighbors(rendered_page: page.Report) -> None:
    assert sorted(rendered_page.pictures) == ["curves", "map"]
    for content in rendered_page.pictures.values():
        assert min(Image.open(BytesIO(content)).size) > 500
    assert "A sample of 100 of 200 images, of 10 classes" in text_of(rendered_page.html)
    assert rendered_page.html.count('<div class="query') == QUERIES
    assert (
        rendered_page.html.count('<figure class="right">') + rendered_page.html.count('<figure class="wrong">')
        == 2 * QUERIES * 5
    )
    names = re.findall(r'alt="image of class (\w+)"', rendered_page.html)
    assert len(set(names)) == QUERIES
    first = rendered_page.html.split('<div class="query')[1]
    for kind, name in re.findall(r'<figure class="(right|wrong)">\s*<img[^>]* alt="(\w+)"', first):
        assert (kind == "right") == (name == names[0])


def test_the_encoder_before_training_stands_next_to_the_trained_one(drawn: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", settings(drawn))
    write_checkpoint(run, settings(drawn))
    untrained = resnet("resnet18", stem="small", width=0.125)
    html = page.report(read_runs([run]), replace(options(), untrained=untrained)).html
    assert html.count('<div class="pair">') == QUERIES
    found = dict(re.findall(r"(before|after) training(?:, step_\d+)?: (\d+\.\d) %", text_of(html)))
    beton = Beton(drawn)
    sample = draw_sample(beton, 100, 1.0, 0)
    after, _ = embed(load_encoder(run, "online"), sample, 1.0, torch.device("cpu"))
    assert float(found["after"]) == round(100 * agreement(after, sample.labels, 5), 1)
    assert found["before"] != found["after"]


def test_baselines_are_levels_of_the_knn_chart(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a")])
    html = page.report(runs, None, baselines={"raw pixels": 0.123}).html
    assert re.findall(r'alt="kNN[^"]*; last values: a 40; raw pixels 12.3"', html)
    assert html.count("raw pixels") == 1
    assert "raw pixels" not in page.report(runs, None).html


def test_text_of_runs_is_escaped(drawn: Path, tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}$\\frac{'
    run = write_run(tmp_path / "<b>$\\frac{", settings(drawn))
    write_checkpoint(run, settings(drawn))
    beton = tmp_path / "evil.beton"
    beton.write_bytes(drawn.read_bytes())
    copy_side_files(drawn, beton)
    manifest = json.loads(Path(f"{drawn}.json").read_text())
    manifest["classes"] = [f"{evil}{i}" for i in range(10)]
    Path(f"{beton}.json").write_text(json.dumps(manifest))
    recipe = (run / "config.yaml").read_text().replace("name: moco_v2", f"name: {json.dumps(evil)}")
    (run / "config.yaml").write_text(f"{recipe}extra: {json.dumps(evil)}\n")
    write_lines(run, [line | {evil: 1.0, "gradient_share_" + evil: 0.5} for line in lines()])
    (run / "summary.json").write_text(json.dumps({"device": evil, "world_size": evil}))
    write_evaluation(run, "x", evil, 0.5, which=evil, interval=[evil, None], checkpoint=evil, test=evil)
    write_evaluation(run, "y", evil, 0.5, settings=evil, map=evil, interval=evil)
    other = write_run(tmp_path / "other", settings(seed=1))
    html = page.report(read_runs([run, other]), options(beton)).html
    assert escaping.escape(evil, quote=False).replace('"', "&#34;") in html
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attributes)))

    Reader().feed(html)
    assert not {tag for tag, _ in tags} & {"script", "b", "iframe", "link", "object"}
    assert not any(key.startswith("on") or key == "href" for _, attributes in tags for key in attributes)
    assert all((attributes.get("src") or "data:image/").startswith("data:image/") for _, attributes in tags)
    assert "7 * 7" in html


_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_MEASURE = """
<iframe id="page" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
const page = document.getElementById("page");
page.onload = () => {{
  const inside = page.contentDocument, images = [...inside.images];
  document.body.dataset.measured = JSON.stringify({{
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
def test_a_browser_shows_all_of_it(width: int, theme: Theme, rendered_page: page.Report, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(_MEASURE.format(width=width, html=json.dumps(rendered_page.html).replace("</", "<\\/")))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--window-size=1600,1000"]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={int(theme is LIGHT)}",
    ]
    assert _BROWSER is not None
    done = subprocess.run(
        [_BROWSER, *options, "--dump-dom", f"file://{frame}"], capture_output=True, text=True, timeout=120, check=True
    )
    measured = json.loads(escaping.unescape(re.findall(r'data-measured="([^"]*)"', done.stdout)[0]))
    assert measured["width"] <= width
    assert measured["background"] == "rgb({}, {}, {})".format(
        *(int(theme.background[i : i + 2], 16) for i in (1, 3, 5))
    )
    assert measured["shown"] == measured["images"] > 20
    attribute = "srcset" if theme is DARK else "src"
    chosen = re.findall(rf' {attribute}="data:image/png[^"]*([^"]{{60}})"', rendered_page.html)
    assert set(chosen) <= set(measured["sources"])
    assert len(chosen) >= 5
