"""DCL's temperature, and its replacement of the base's loss."""

from __future__ import annotations

import pytest

from methods.co2 import CO2
from methods.dcl import DCL
from methods.registry import BASES, Terms, build_objective
from tests.methods import formulas
from tests.methods.test_base import QUEUE, embeddings


def test_temperature_defaults_to_the_bases() -> None:
    base = BASES["moco_v2"]
    e = embeddings(base)
    q, k = e["q1"].tolist(), e["k2"].tolist()
    for term, t in ((DCL(), base.temperature), (DCL(temperature=0.7), 0.7)):
        assert term(e, base)["dcl"].value.item() == pytest.approx(formulas.dcl(q, k, QUEUE.tolist(), t), abs=1e-10)


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", "simclr"])
def test_dcl_replaces_the_base_loss(name: str) -> None:
    base = BASES[name]
    assert list(build_objective(base, Terms(dcl=DCL(), co2=CO2()))(embeddings(base))) == ["co2", "dcl"]
