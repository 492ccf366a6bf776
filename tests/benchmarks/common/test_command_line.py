"""Command lines of the benchmarks."""

from __future__ import annotations

from types import ModuleType

import pytest

from benchmarks import loader, scaling, step, train, walk
from pipeline.system.errors import InputError


@pytest.mark.parametrize(
    ("module", "former", "present"),
    [
        (loader, "--backends", "--compare"),
        (step, "--ways", "--compare"),
        (step, "--threads", "--torch-threads"),
        (scaling, "--rounds", "--runs"),
        (train, "--rounds", "--runs"),
        (walk, "--to", "--out"),
    ],
)
def test_former_options_name_the_present_ones(module: ModuleType, former: str, present: str) -> None:
    with pytest.raises(InputError, match=f"{former}: renamed to {present}"):
        module.parser().parse_known_args([former, "x"])
    assert present in module.parser().format_help()
