"""Tests of option names."""

from __future__ import annotations

import argparse

import pytest

from pipeline.system.cli import ArgumentParser, hyphenated
from pipeline.system.errors import InputError


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="x")
    made.add_argument("--save-every", type=int, default=0)
    made.add_argument("rest", nargs="*")
    return made


@pytest.mark.parametrize(
    "given", [["--save-every", "3"], ["--save_every", "3"], ["--save_every=3"], ["--save-every=3"]]
)
def test_hyphens_and_underscores_are_the_same(given: list[str]) -> None:
    assert parser().parse_args(given).save_every == 3


def test_values_and_arguments_after_a_double_dash_are_unchanged() -> None:
    given = ["--save_every=1", "a_b", "--", "--c_d"]
    assert hyphenated(given) == ["--save-every=1", "a_b", "--", "--c_d"]
    assert hyphenated(["--out=my_run", "-a_b"]) == ["--out=my_run", "-a_b"]


def test_names_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--save", "3"])
    assert capsys.readouterr().err == "error: --save: no such option, did you mean --save-every: see x --help\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["knn", "--tests", "a"], "--tests: no such option, did you mean --test: see x knn --help"),
        (["knn", "--top_k=3"], "--top_k: no such option: see x knn --help"),
        (["kn"], "command 'kn', did you mean knn: choose one of linear, knn: see x --help"),
        (["knn", "--format", "c"], "--format 'c': choose one of a, b: see x knn --help"),
        (["knn", "--test"], "argument --test: expected one argument: see x knn --help"),
        (["knn", "b"], "b: no such argument: see x knn --help"),
    ],
)
def test_errors_are_one_line_with_a_remedy(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    top = ArgumentParser(prog="x")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("linear")
    knn = commands.add_parser("knn")
    knn.add_argument("--test")
    knn.add_argument("--format", choices=["a", "b"])
    with pytest.raises(SystemExit) as ended:
        top.parse_args(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_suggestions_do_not_depend_on_argparses_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(argparse, "_", lambda text: "?")
    made = parser()
    made.add_argument("--bits", type=int, choices=[8, 16])
    for given, message in (
        (["--bits", "9"], "--bits 9: choose one of 8, 16"),
        (["--bit", "8"], "--bit: no such option, did you mean --bits"),
    ):
        with pytest.raises(SystemExit):
            made.parse_args(given)
        assert capsys.readouterr().err == f"error: {message}: see x --help\n"


def test_unknown_options_are_returned_as_typed() -> None:
    arguments = ["--save_every=1", "--log_every", "2", "--knn.every=3"]
    assert parser().parse_known_args(arguments)[1] == ["--log_every", "--knn.every=3"]


@pytest.mark.parametrize("given", [["--to", "x"], ["--to=x"]])
def test_former_names_are_refused_with_the_present_one(given: list[str]) -> None:
    renaming = ArgumentParser(renamed={"--to": "--out"})
    renaming.add_argument("--out")
    renaming.add_argument("rest", nargs="*")
    with pytest.raises(InputError, match="--to: renamed to --out"):
        renaming.parse_args(given)
    assert renaming.parse_args(["--", "--to"]).rest == ["--to"]
