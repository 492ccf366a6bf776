"""The struct types of the file format equal FFCV's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline import beton_format
from pipeline.native import libffcv


def test_types_equal_ffcvs() -> None:
    assert libffcv  # imported before ffcv: it restores the number of threads
    types = pytest.importorskip("ffcv.types")
    assert types.CURRENT_VERSION == beton_format.VERSION
    assert types.HeaderType == beton_format.HEADER
    assert types.ALLOC_TABLE_TYPE == beton_format.TABLE_ENTRY
    assert types.FieldDescType == beton_format.FIELD_DESCRIPTOR
    kinds = {number: kind for number, kind in types.TYPE_ID_HANDLER.items() if kind is not None}
    arrays: dict[str, Any] = {"NDArrayField": (np.dtype("<f4"), (2,)), "TorchTensorField": (torch.float32, (2,))}
    fields = [kinds[number](*arrays.get(kinds[number].__name__, ())) for number in sorted(beton_format.FIELDS)]
    assert set(kinds) == set(beton_format.FIELDS)
    for number, field in enumerate(fields):
        assert field.metadata_type == beton_format.FIELDS[number]
        row = beton_format.row_type([number, beton_format.INT])
        assert row == types.get_metadata_type([field, fields[beton_format.INT]])
    assert beton_format.row_type(beton_format.FIELDS) == types.get_metadata_type(fields)
    names = {"FloatField": "FLOAT", "IntField": "INT", "RGBImageField": "IMAGE", "BytesField": "BYTES"}
    names |= {"NDArrayField": "NDARRAY", "JSONField": "JSON", "TorchTensorField": "TENSOR"}
    assert {number: names[kind.__name__] for number, kind in kinds.items()} == {
        getattr(beton_format, name): name for name in names.values()
    }
