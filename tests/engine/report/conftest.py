"""Options of galleries, and pictures that are laid out but not rendered."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.report import page, tsne
from engine.report.gallery import GalleryOptions
from engine.report.run_folder import read_runs
from tests.engine.run_folders import lines, settings, write_checkpoint, write_lines, write_run


@pytest.fixture(autouse=True)
def fast_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip rendering, and take the first two features as a map, except for tests with `rendered`."""
    if "rendered" not in request.fixturenames:
        dot = BytesIO()
        Image.new("RGB", (1, 1)).save(dot, "PNG")
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, out, **more: out.write(dot.getvalue()))
        monkeypatch.setattr(tsne, "project", lambda features, seed: features[:, :2].numpy())


@pytest.fixture
def rendered() -> None:
    """Have pictures rendered."""


@pytest.fixture(scope="session")
def rendered_page(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> page.Report:
    """A page of two runs, rendered, with few charts."""
    runs = [tmp_path_factory.mktemp("runs") / name for name in ("a", "b" * 100)]
    for seed, run in enumerate(runs):
        write_run(run, settings(drawn, seed=seed))
        write_checkpoint(run, settings(drawn), seed=seed)
        keys = ("step", "epoch", "loss", "knn_top1", "alignment", "uniformity")
        write_lines(run, [{key: line[key] for key in keys if key in line} for line in lines()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tsne, "project", lambda features, seed: features[:, :2].numpy())
        return page.report(read_runs(runs), options())


def options(data: Path | str = "", limit: int = 100) -> GalleryOptions:
    """Return options of galleries on the CPU."""
    return GalleryOptions(str(data), 5, limit, 0, "online", torch.device("cpu"))


def text_of(html: str) -> str:
    """Return the visible text, in one line."""
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            texts.append(data)

    reader = Reader()
    reader.feed(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    return " ".join(" ".join(texts).split())
