"""Some samples of a beton as a data set of their own."""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.beton import Beton


class Subset(Beton):
    """Samples `indices` (int64 [n]) of `whole`, numbered anew: its sample i is sample `indices[i]` there."""

    def __init__(self, whole: Beton, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, indices
        self.path, self.manifest, self.file_size, self.data = whole.path, whole.manifest, whole.file_size, whole.data
        for name in ("heights", "widths", "modes", "pointers", "sizes", "labels"):
            setattr(self, name, getattr(whole, name)[indices])
        self.crc32 = None if whole.crc32 is None else whole.crc32[indices]
        self.unreadable = frozenset(np.flatnonzero(np.isin(indices, list(whole.unreadable))).tolist())

    @property
    def in_one_file(self) -> bool:
        """Whether all records stand in one file."""
        return self.whole.in_one_file

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return self.whole.classes

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size]."""
        return self.whole.record(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Return where sample `index` came from, or its number in the whole."""
        return self.whole.name(int(self.indices[index]))

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The whole's, and a hash of the indices."""
        return f"{self.whole.fingerprint}-{hashlib.sha256(self.indices.astype(np.int64).tobytes()).hexdigest()[:8]}"
