"""Tests of substitutes for damaged records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.beton import Beton
from pipeline.sampling.substitutes import Substitutes
from pipeline.system.errors import DamagedRecord, InputError


def _damaged(*samples: int) -> DamagedRecord:
    return DamagedRecord("damaged", samples)


def test_bad_records_are_replaced_by_the_next_intact_one(drawn: Path) -> None:
    substitutes = Substitutes(Beton(drawn), "skip")
    for samples in ((78,), (199, 5), (77,)):
        substitutes.add(_damaged(*samples))
    ids = np.array([4, 5, 77, 78, 79, 198, 199, 0])
    assert substitutes.resolve(ids).tolist() == [4, 6, 79, 79, 79, 198, 0, 0]


def test_a_damaged_record_that_is_not_skipped_is_raised(drawn: Path) -> None:
    with pytest.raises(DamagedRecord):
        Substitutes(Beton(drawn), "error").add(_damaged(3))
    skipping = Substitutes(Beton(drawn), "skip")
    skipping.add(_damaged(3))
    with pytest.raises(DamagedRecord):
        skipping.add(_damaged(3))  # known, so that it should not have been read


def test_too_many_damaged_records_are_an_error(drawn: Path) -> None:
    with pytest.raises(InputError, match="11 damaged records, the first of them 50, and at most 10 are skipped"):
        Substitutes(Beton(drawn), "skip").add(_damaged(*range(50, 61)))
