"""Exported encoders: the same features in every format, and strict loading in installed libraries' models."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.export import formats
from engine.export.formats import FORMATS, export
from engine.weights.architecture import Architecture
from engine.weights.load import LoadedEncoder, load_encoder
from engine.weights.readers import METADATA
from methods.encoders import ResNet
from pipeline.system.errors import InputError, RunFailed

_SIZE = 64  # pixels: small, to be quick
ARCHITECTURES = [pytest.param("resnet18", marks=pytest.mark.slow), "resnet50", "vit_small"]


def _loaded(folder: Path, arch: str, **more: object) -> LoadedEncoder:
    size = {"size": _SIZE, "heads": 12 if arch.startswith("vit") else 0}
    file = folder / "source.safetensors"
    file.unlink(missing_ok=True)
    file.symlink_to(_source(Architecture(arch, **size | more)).name)  # type: ignore[arg-type]
    return load_encoder(file)


@functools.cache
def _source(architecture: Architecture) -> Any:
    """Return a temporary file with such an encoder; it exists as long as this process."""
    file = tempfile.NamedTemporaryFile(suffix=".safetensors")  # noqa: SIM115
    save_file(_drawn(architecture), file.name, metadata={METADATA: json.dumps(asdict(architecture))})
    return file


@functools.cache
def _drawn(architecture: Architecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = architecture.build().state_dict()
    for name, value in state.items():
        if "running_var" in name:
            value.uniform_(0.5, 2)
    return state


_OTHER_VITS = {"torchvision", "mmdet", "onnx"}  # whose names differ from timm's, which ours are


@pytest.mark.parametrize(
    ("format", "arch"),
    [
        pytest.param(format, arch, marks=[pytest.mark.slow] * (arch == "resnet50" or arch not in fast))
        for format in FORMATS
        for fast in [{"resnet18", "vit_small"} if format in _OTHER_VITS else {"resnet18"}]
        for arch in ("resnet18", "resnet50", "vit_small")
    ],
)
def test_features_are_the_same_after_a_round_trip(format: str, arch: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    loaded, file = _loaded(tmp_path, arch), tmp_path / f"x{FORMATS[format].suffix}"
    assert export(loaded, format, file) <= 1e-5
    images = torch.randn(5, 3, _SIZE, _SIZE)  # other and more images than the export itself tries
    if format == "onnx":
        run = formats.read_back(file, 0)
        features = run(images)
        assert torch.allclose(run(images[:1]), features[:1], atol=1e-5 * float(features.abs().max()))
    else:
        features = load_encoder(file, heads=12 if arch == "vit_small" else 0).backbone(images)
    expected = loaded.backbone(images).detach()
    assert expected.std() > 1e-3
    assert torch.allclose(features, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    card = file.with_name(f"{file.name}.md").read_text()
    assert f"{loaded.backbone.features} features" in card
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_torchvisions_model_loads_strictly(arch: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    loaded, file = _loaded(tmp_path, arch), tmp_path / "x.pth"
    export(loaded, "torchvision", file)
    if arch == "vit_small":
        model = models.VisionTransformer(_SIZE, 16, 12, 12, 384, 1536)
        model.heads = torch.nn.Identity()
    else:
        model = getattr(models, arch)()
        model.fc = torch.nn.Identity()
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    _equal(model, loaded)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_timms_model_loads_strictly(arch: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    loaded, file = _loaded(tmp_path, arch), tmp_path / "x.safetensors"
    export(loaded, "timm", file)
    more = {"img_size": _SIZE, "num_heads": 12} if arch == "vit_small" else {}
    name = "vit_small_patch16_224" if arch == "vit_small" else arch
    model = timm.create_model(name, num_classes=0, **more)
    model.load_state_dict(load_file(file), strict=True)
    _equal(model, loaded)


def _equal(model: torch.nn.Module, loaded: LoadedEncoder) -> None:
    images = torch.randn(2, 3, _SIZE, _SIZE)
    with torch.no_grad():
        expected, features = loaded.backbone(images), model.eval()(images)
    assert torch.allclose(features, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2", "mmdet"])
def test_names_and_shapes_are_those_of_the_libraries_models(
    format: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """detectron2's ViT has no class token and no last norm: its checkpointer ignores these two."""
    expected = {}
    for line in Path(__file__).with_name(f"{format}_keys.txt").read_text().splitlines()[1:]:
        key_arch, name, shape = line.split()
        if key_arch == arch:
            expected[name] = [int(side) for side in shape.split("x")] if shape != "-" else []
    size = 224 if arch.startswith("vit") else _SIZE  # a ResNet has no parameter of its size
    loaded, file = _loaded(tmp_path, arch, size=size), tmp_path / f"x{FORMATS[format].suffix}"
    monkeypatch.setattr(formats, "_distance", lambda encoder, read: 0.0)  # of features, which other tests compare
    export(loaded, format, file)
    state: Any = load_file(file) if format == "timm" else torch.load(file, weights_only=True)
    state = state["model"] if format == "detectron2" else state["state_dict"] if format == "mmdet" else state
    if (format, arch) == ("detectron2", "vit_small"):
        assert [state.pop(name).shape for name in ("cls_token", "norm.weight", "norm.bias")] == [
            (1, 1, 384),
            (384,),
            (384,),
        ]
    assert {name: list(value.shape) for name, value in state.items()} == expected


def test_state_dicts_are_wrapped_as_their_libraries_expect(tmp_path: Path) -> None:
    loaded = _loaded(tmp_path, "resnet18")
    export(loaded, "detectron2", tmp_path / "d.pth")
    detectron2 = torch.load(tmp_path / "d.pth", weights_only=True)
    assert detectron2["matching_heuristics"] is True  # detectron2/checkpoint/detection_checkpoint.py
    export(loaded, "mmdet", tmp_path / "m.pth")
    assert torch.load(tmp_path / "m.pth", weights_only=True).keys() == {"state_dict", "meta"}


def test_architectures_that_a_library_lacks_are_refused(tmp_path: Path) -> None:
    narrow = _loaded(tmp_path, "resnet18", width=0.25, stem="small")
    for format in ("torchvision", "timm", "detectron2", "mmdet"):
        with pytest.raises(InputError, match="choose safetensors or onnx"):
            export(narrow, format, tmp_path / "x")
    assert export(narrow, "safetensors", tmp_path / "x.safetensors") == 0
    again = load_encoder(tmp_path / "x.safetensors")
    assert again.architecture == narrow.architecture
    small = _loaded(tmp_path, "resnet18", stem="small")
    with pytest.raises(InputError, match="detectron2"):
        export(small, "detectron2", tmp_path / "x.pth")
    assert export(small, "timm", tmp_path / "y.safetensors") == 0
    shallow = _loaded(tmp_path, "resnet10", stem="medium")
    assert str(shallow.architecture) == "resnet10 (medium stem)"
    with pytest.raises(InputError, match=r"--format torchvision: has no resnet10 \(medium stem\)"):
        export(shallow, "torchvision", tmp_path / "x.pth")


def test_card_of_a_medium_stem_names_its_convolution(tmp_path: Path) -> None:
    export(_loaded(tmp_path, "resnet18", stem="medium"), "torchvision", tmp_path / "x.pth")
    code = (tmp_path / "x.pth.md").read_text()
    assert "model.conv1 = torch.nn.Conv2d(3, 64, 5, 2, 2, bias=False)" in code


def test_there_are_no_weights_without_a_card(tmp_path: Path) -> None:
    loaded = _loaded(tmp_path, "resnet18")
    (tmp_path / "x.safetensors.md").mkdir()
    with pytest.raises(InputError, match=r"x.safetensors: cannot be written \(Is a directory\): choose another --out"):
        export(loaded, "timm", tmp_path / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors", "x.safetensors.md"]


def test_a_file_with_other_features_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _loaded(tmp_path, "resnet18")
    other = _loaded(tmp_path, "resnet18")
    assert isinstance(other.backbone, ResNet)
    other.backbone.conv1.weight.data *= 1.01
    monkeypatch.setattr(formats, "read_back", lambda path, heads: other.backbone)
    with pytest.raises(RunFailed, match=r"features differ by .* when read back: nothing was written"):
        export(loaded, "timm", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_file_states_the_crop_of_evaluations_and_can_be_read_by_others(tmp_path: Path) -> None:
    encoder = _loaded(tmp_path, "resnet18", width=0.125)
    encoder.crop_ratio = 0.6
    export(encoder, "safetensors", tmp_path / "x.safetensors")
    assert load_encoder(tmp_path / "x.safetensors").preprocess.crop_ratio == 0.6
    assert "center crop has 0.6 of the image's shorter side" in (tmp_path / "x.safetensors.md").read_text()
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    for ratio in (0.0001, 1):
        save_file(
            encoder.backbone.state_dict(),
            tmp_path / "y.safetensors",
            metadata={METADATA: json.dumps(asdict(encoder.architecture) | {"crop_ratio": ratio * 2})},
        )
        if ratio == 1:
            with pytest.raises(InputError, match="states crop_ratio 2, not above 0 and up to 1"):
                load_encoder(tmp_path / "y.safetensors")


@pytest.mark.parametrize("out", ["x", "folder.pth"])
def test_other_names_of_the_file_are_refused(out: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(InputError, match=r"give the name of a file that ends in .pth"):
        export(_loaded(tmp_path, "resnet18"), "torchvision", tmp_path / out)
