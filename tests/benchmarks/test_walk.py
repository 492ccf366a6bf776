"""The walk through every command."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import walk
from benchmarks.walk import Step, take


def test_a_command_runs_in_the_clone_with_its_output_in_a_log(tmp_path: Path) -> None:
    clone, out = tmp_path / "clone", tmp_path / "out"
    clone.mkdir()
    out.mkdir()
    row = take(Step("a b, c", "pwd; echo no >&2; exit 3", status=3), clone, out)
    assert (row["status"], row["as_expected"], row["log"]) == (3, True, "a-b-c.log")
    assert (out / "a-b-c.log").read_text() == f"{clone}\nno\n"
    assert not take(Step("d", "exit 3"), clone, out)["as_expected"]


def test_a_command_is_interrupted_in_its_second_epoch(tmp_path: Path) -> None:
    wait = "trap 'echo asked; exit 0' INT; mkdir -p walk/run; echo '{\"epoch\": %s}' > walk/run/metrics.jsonl; %s"
    far = Step("far", wait % (1.1, "while :; do sleep 0.05; done"), interrupt=walk._in_second_epoch)
    assert take(far, tmp_path, tmp_path)["as_expected"]
    assert (tmp_path / "far.log").read_text() == "asked\n"
    near = Step("near", wait % (0.9, "sleep 0.5"), interrupt=walk._in_second_epoch)
    (tmp_path / "walk" / "run" / "metrics.jsonl").unlink()
    assert not take(near, tmp_path, tmp_path)["as_expected"]  # it ended before it was interrupted
    (tmp_path / "walk" / "run" / "metrics.jsonl").write_text('{"epoch": 1')
    assert not walk._in_second_epoch(tmp_path)


@pytest.mark.parametrize("tests", [False, True])
def test_every_command_runs_once(tests: bool) -> None:
    steps = walk.steps(Namespace(minutes=1.0, tests=tests, source="x.tar", size=224))
    assert len({step.name for step in steps}) == len(steps)
    assert ("./millrace test" in [step.call for step in steps]) == tests
    assert json.dumps([step.call for step in steps]).count("--resume auto") == 1
