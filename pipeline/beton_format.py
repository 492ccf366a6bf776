"""Struct types of FFCV's file format, version 2, little-endian: those of `ffcv.types`, without FFCV."""

from collections.abc import Iterable

import numpy as np

VERSION = 2
JPEG, RAW = 0, 1  # a record's `mode`

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_DESCRIPTOR = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
TABLE_ENTRY = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FLOAT, INT, IMAGE, BYTES, NDARRAY, JSON, TENSOR = range(7)  # a field's `type_id`
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
FIELDS = {
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]),
    BYTES: _BYTES,
    NDARRAY: np.dtype("<u8"),
    JSON: _BYTES,
    TENSOR: np.dtype("<u8"),
}
"""Metadata of a sample in a field of each type."""


def row_type(type_ids: Iterable[int]) -> np.dtype:
    """Return the type of a sample's metadata: one member a field, `f0`, `f1` and so on."""
    return np.dtype([("", FIELDS[type_id]) for type_id in type_ids], align=True)
