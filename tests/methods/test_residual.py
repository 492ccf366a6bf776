"""The residual term's identities."""

from __future__ import annotations

import pytest

from methods.residual import gap
from tests.methods.formulas import unit


def test_gap_is_zero_for_equal_embeddings_of_any_length() -> None:
    q = unit(5, 4, seed=1)
    assert gap(q, q).item() == pytest.approx(0, abs=1e-15)
    assert gap(3 * q, 0.5 * q).item() == pytest.approx(0, abs=1e-14)
    assert gap(q, -q).item() == pytest.approx(2, abs=1e-14)
