"""The benchmark of collectives within a CUDA graph calls every collective in a group of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.nccl_graph import _One, report
from tests import processes
from tests.benchmarks.test_step import SMALL


@pytest.mark.slow
def test_every_collective_is_called_and_the_states_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    call = [sys.executable, "-m", "benchmarks.nccl_graph", *SMALL, "--steps", "1", "--json", str(out)]
    run = processes.run(call)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert {"allreduce", "allgather_base"} <= set(result["collectives"])
    assert result["equal"]
    assert "there is no GPU" in result["refusal"]
    assert all(value > 0 for value in result["milliseconds"].values())
    assert f"a step has {sum(result['collectives'].values())} collectives" in run.stdout


@pytest.mark.parametrize(("equal", "text"), [(True, "equal, bit by bit"), (False, "differ by at most 0.5")])
def test_a_recorded_step_is_reported(equal: bool, text: str) -> None:
    result = {
        "steps": 9,
        "collectives": {"allreduce": 2},
        "milliseconds": {"eager": 3.0, "graph": 1.0},
        "refusal": None,
    }
    notes = report({**result, "equal": equal, "largest_difference": 0.5, "largest_value": 1.0}).notes
    assert notes[0] == "the whole step was recorded and replayed"
    assert text in notes[2]
    assert notes[3] == "eager to graph: 3.00"


def test_one_counts_as_several_ranks() -> None:
    size = _One(1)
    assert size > 1
    assert size != 1
    assert (size * 3, list(range(size)), 6 / size) == (3, [0], 6.0)
