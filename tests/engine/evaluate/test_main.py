"""The command line of `python -m engine.evaluate`."""

from __future__ import annotations

import pytest

from engine.evaluate.__main__ import main, parser
from pipeline.backends import BACKENDS


@pytest.mark.parametrize(("old", "new"), [("--share", "--crop-ratio"), ("--to", "--out")])
def test_former_option_names_are_refused_in_one_line(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "features", "x.pth", "--train", "x.beton", old, "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {old}: renamed to {new}\n"


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_backend_can_be_chosen(backend: str) -> None:
    arguments = ["knn", "x.pth", "--train", "x.beton", "--backend", backend]
    assert parser().parse_args(arguments).backend == backend


def test_out_is_a_file_for_features_and_a_folder_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    for command, meaning in (("features", "--out FILE"), ("knn", "folder of results"), ("detect", "folder of results")):
        with pytest.raises(SystemExit):
            parser().parse_args([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert meaning in text
        assert text.count("--out ") == 2  # in the usage, and among the options
