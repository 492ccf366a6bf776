"""Parts of a beton."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.beton import Beton
from pipeline.storage.subset import Subset


def test_a_subset_reads_the_samples_of_the_beton(drawn: Path) -> None:
    beton = Beton(drawn)
    part = Subset(beton, np.array([150, 3, 77]))
    assert len(part) == 3
    assert part.labels.tolist() == beton.labels[[150, 3, 77]].tolist()
    assert part.name(1) == beton.name(3)
    assert (part.record(2) == beton.record(77)).all()
    assert part.fingerprint != Subset(beton, np.array([150, 3, 78])).fingerprint != beton.fingerprint
