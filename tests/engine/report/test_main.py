"""The command line of `python -m engine.report`."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.report.__main__ import main, parser
from pipeline.system.errors import InputError
from tests.engine.run_folders import settings, write_run


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_pictures_are_written_next_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a")
    assert command(monkeypatch, str(run), "--no-pictures") == 0
    assert {path.name for path in run.iterdir()} >= {"report.html", "report-curves.png"}
    assert not list(run.glob(".*"))
    other, page = write_run(tmp_path / "b", settings(seed=1)), tmp_path / "report.html"
    assert command(monkeypatch, str(run), str(other), "--no-pictures", "--out", str(page)) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(("options", "expected"), [([], True), (["--pictures"], True), (["--no-pictures"], False)])
def test_pictures_are_optional(options: list[str], expected: bool) -> None:
    assert parser().parse_args(["x", *options]).pictures == expected


def test_former_spelling_names_the_present_one() -> None:
    with pytest.raises(InputError, match="--neighbours: renamed to --neighbors"):
        parser().parse_args(["x", "--neighbours", "3"])


def test_several_runs_need_a_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, str(write_run(tmp_path / "a")), str(tmp_path / "b"), "--no-pictures") == 2
    assert capsys.readouterr().err == "error: 2 runs: name their page, --out FILE.html\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "x.txt"], "ends in .html"),
        (["--out", "no/x.html"], "cannot be written"),
        (["--neighbors", "0"], "choose 1 to 100"),
        (["--limit", "3"], "choose 10"),
        (["--seed", "-1"], "0 or more"),
    ],
)
def test_impossible_options_are_one_line_and_exit_status_2(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, str(run), "--no-pictures", *more) == 2
    assert message in capsys.readouterr().err
