"""A subset of a beton's samples as a data set."""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.beton import Beton


class Subset(Beton):
    """Samples `indices` (int64 [n]) of `parent`: sample i here is sample `indices[i]` there."""

    def __init__(self, parent: Beton, indices: np.ndarray) -> None:
        self.parent, self.indices = parent, indices
        for name in ("path", "manifest", "columns", "file_size", "data", "classes", "in_one_file"):
            setattr(self, name, getattr(parent, name))
        for name in ("heights", "widths", "modes", "pointers", "sizes", "labels"):
            setattr(self, name, getattr(parent, name)[indices])
        self.crc32 = None if parent.crc32 is None else parent.crc32[indices]
        self.unreadable = frozenset(np.flatnonzero(np.isin(indices, list(parent.unreadable))).tolist())

    def record(self, index: int) -> np.ndarray:
        """Return the stored bytes of sample `index`: uint8 [size]."""
        return self.parent.record(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Return where sample `index` came from, or its number in the parent."""
        return self.parent.name(int(self.indices[index]))

    def place(self, index: int) -> tuple[Path, int]:
        """Return the file that contains sample `index`, and its number there."""
        return self.parent.place(int(self.indices[index]))

    @cached_property
    def fingerprint(self) -> str:
        """The parent's fingerprint, and a hash of the indices."""
        return f"{self.parent.fingerprint}-{hashlib.sha256(self.indices.astype(np.int64).tobytes()).hexdigest()[:8]}"
