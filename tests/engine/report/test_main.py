"""The command line of `python -m engine.report`."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.report.__main__ import main
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
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, str(run), str(write_run(tmp_path / "b", settings(seed=1))), "--no-pictures") == 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


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
