"""CO2's identities."""

from __future__ import annotations

import pytest

from methods.co2 import consistency
from tests.methods.formulas import unit


def test_consistency_is_symmetric_and_zero_where_query_and_key_agree() -> None:
    q, k, negatives = unit(4, 6, seed=1), unit(4, 6, seed=2), unit(9, 6, seed=3)
    assert consistency(q, q, negatives, 0.13).item() == pytest.approx(0, abs=1e-15)
    forward, backward = consistency(q, k, negatives, 0.13), consistency(k, q, negatives, 0.13)
    assert forward.item() == pytest.approx(backward.item(), abs=1e-14)
    assert forward > 0.01
