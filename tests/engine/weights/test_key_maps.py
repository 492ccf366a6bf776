"""Names of other libraries, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from engine.weights.key_maps import Library, to_library, to_ours
from engine.weights.load import digest, load_encoder
from methods.registry import build_backbone
from tests.engine.weights.conftest import backbone


@pytest.mark.parametrize("library", ["torchvision", "timm", "detectron2", "mmdet"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vit_small"])
def test_names_of_other_libraries_are_recognized(library: Library, arch: str, tmp_path: Path) -> None:
    encoder = backbone(arch)
    theirs = to_library(encoder, library, transformer=arch == "vit_small")
    assert list(to_ours(theirs)) == list(encoder)
    save_file({name: value.contiguous() for name, value in theirs.items()}, tmp_path / "x.safetensors")
    loaded = load_encoder(tmp_path / "x.safetensors", heads=12 if arch == "vit_small" else 0)
    assert loaded.matched == len(encoder)
    module = build_backbone(arch)
    module.load_state_dict(encoder)
    assert digest(loaded.backbone) == digest(module)
